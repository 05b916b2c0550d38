"""How far the roofline's predictions are from a measured table."""

from __future__ import annotations

import statistics
from typing import Any

from muxserve.placement.solver.cost import KINDS
from muxserve.placement.solver.roofline import Roofline
from muxserve.placement.solver.workload import Workload


def errors(document: Any, workload: Workload) -> list[dict[str, Any]]:
    """By kind of job, model and degree: the relative error over all cells that were measured."""
    shapes = {model.model: model.shape for model in workload.models}
    roofline = Roofline(shapes)
    found = []
    for kind, label in KINDS.items():
        predict = roofline.prefill if kind == "prefill" else roofline.decode
        for model, degrees in document.items():
            if model not in shapes:
                continue
            for degree, shares in degrees.items():
                off = [
                    predict(model, int(degree), int(share) / 100, int(batch), int(length)) * 1e3 / cell[label]
                    - 1
                    for share, batches in shares.items()
                    for batch, lengths in batches.items()
                    for length, cell in lengths.items()
                    if cell[label] > 0
                ]
                found.append(
                    {
                        "kind": kind,
                        "model": model,
                        "tensor_parallel": int(degree),
                        "cells": len(off),
                        "mean": statistics.mean(off),
                        "mean_absolute": statistics.mean(map(abs, off)),
                        "median_absolute": statistics.median(map(abs, off)),
                    }
                )
    return found


def print_errors(found: list[dict[str, Any]]) -> None:
    """As a table in Markdown."""
    print("| job | model | tensor parallel | cells | mean error | mean absolute | median absolute |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(found, key=lambda r: (r["kind"], r["model"], r["tensor_parallel"])):
        print(
            f"| {row['kind']} | {row['model']} | {row['tensor_parallel']} | {row['cells']} "
            f"| {row['mean']:+.0%} | {row['mean_absolute']:.0%} | {row['median_absolute']:.0%} |"
        )
    for kind in KINDS:
        rows = [row for row in found if row["kind"] == kind]
        cells = sum(row["cells"] for row in rows)
        whole = sum(row["mean_absolute"] * row["cells"] for row in rows) / max(1, cells)
        print(f"| {kind} | all | | {cells} | | {whole:.1%} | |")
