"""`Latency`: how long jobs take on this device, fitted to those that ended.

    decode step = (a + b · sequences + c · context) · (1 + g · beside)
    prefill job = (o + p · tokens + q · tokens · context) · (1 + h · beside)

with a, b, c and o, p, q per model and g, h of the unit; `beside` is the part of its time in which a job of
the other kind ran too. Decode steps beside those of another model have a, b and c of their own: they have
fewer cores, and share the memory's bandwidth.

The last term of a prompt counts only as far as contexts of such length were seen: from short prompts nothing
can be told of it, and any value of q would do. Until longer ones come, theirs is that of the longest.

Least squares of the error relative to what was expected (relative to what was seen, it would find too little)
over observations, with no coefficient below zero. Each new one lets be forgotten what it says anew, and no
more (directional forgetting: Kulhavy, Restricted exponential forgetting in real-time identification, 1987).
What ran with nothing beside it counts most: of what did not, less can be told. A model that was not observed
yet is taken to be like another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.scheduler.policy.interface import JobEnded
from muxserve.scheduler.policy.line import FORGET, Line
from muxserve.scheduler.policy.pace import LEAST

PRIOR = 0.02
"""Weight of the coefficients that are assumed at first, in observations."""
CONTENDED = {"decode": 0.01, "prefill": 0.2}
"""Weight of an observation with neighbours all of its time, by kind: prompts seldom have none."""
SWEEPS = 8
"""Passes over the coefficients after each observation."""
MEMORY = 0.05
"""Weight of the newest observation where no line is fitted."""
JOINT = 0.3
"""Weight of a decode job that computed prompts too: what these took is an estimate."""
BESIDE = 0.9
"""Part of its time from which a prefill job says what a neighbour costs."""
EXTRA = 0.9
"""What a neighbour is taken to cost before anything is known."""
APART = 0.01
"""Variance of the part of their time in which jobs had company, from which they say what it costs."""
FEW = 2.0
"""Most sequences of a step that says what a lone one takes."""
ALONE = 0.1
"""Part of its time that such a job may have had company."""
NEWEST = 0.1
"""Weight of the newest one."""
AROUND = 0.2
"""How far a fit may differ from that, as a part of it."""
ENOUGH = 8
"""Observations after which a fit can tell what a neighbour cost."""
MOST = 4.0
"""Most that a neighbour is taken to cost: beyond that something else was going on."""
RISE = 1.01
"""By how much the shortest step of late grows with each one that takes longer."""
LEAST_PART = 0.5
EACH = 1 / 16
"""A lone sequence's step is taken to be at least that part of one of n, divided by 1 + `EACH` · n."""
DEEPER = 2.0
"""By how much contexts of prompts count further with one job: the fit is to learn of them first."""
SHORTEST = 1e-5
"""Seconds of a step at least: a fit may say that one without context takes none."""
STEP = (0.010, 0.001, 0.0)
PREFILL = (0.005, 0.001, 0.0)
"""Seconds that are assumed before anything is known."""
SCALE = (1.0, 100.0, 10_000.0)
"""Large values of the three features."""

BETTER = 0.9
"""How much shorter a cycle has to be for models to decode one after the other and not side by side."""

Features = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Cycle:
    """One decode step of each of some models."""

    seconds: float
    """With nothing beside them."""
    exclusive: frozenset[str]
    """Models that decode with no other one beside them."""


class Fit:
    """A linear function of three features."""

    def __init__(self, first: Features) -> None:
        """`first`: coefficients before anything is known."""
        self.seen = 0
        self._at = [w * s for w, s in zip(first, SCALE, strict=True)]
        self._first = tuple(self._at)
        self._square = [[0.0] * 3 for _ in range(3)]
        self._moment = [0.0] * 3

    def __call__(self, features: Features) -> float:
        """The value there."""
        (a, b, c), (x, y, z) = self._at, features
        return a * x / SCALE[0] + b * y / SCALE[1] + c * z / SCALE[2]

    def observe(self, features: Features, value: float, weight: float = 1.0) -> None:
        """It was `value` there."""
        expected = self(features) if self.seen >= ENOUGH else value
        self.seen += 1
        # Relative: small ones are to be met as well as large ones.
        expected = max(expected, value / MOST)
        f = [x / s / expected for x, s in zip(features, SCALE, strict=True)]
        # Of all that is known, R, part of R f fᵀ R / fᵀ R f is forgotten: without the rest a model that has
        # large batches all the time would know nothing of small ones by and by.
        along = [sum(r * x for r, x in zip(row, f, strict=True)) for row in self._square]
        much = sum(a * x for a, x in zip(along, f, strict=True))
        part = (1 - FORGET**weight) / much if much > 0 else 0.0
        moment = sum(m * x for m, x in zip(self._moment, f, strict=True))
        for i in range(3):
            self._moment[i] += weight * f[i] * value / expected - part * along[i] * moment
            row = self._square[i]
            for j in range(3):
                row[j] += weight * f[i] * f[j] - part * along[i] * along[j]
        for _ in range(SWEEPS):
            for i in range(3):
                row = self._square[i]
                prior = PRIOR * row[i] + 1e-9
                others = sum(row[j] * self._at[j] for j in range(3) if j != i)
                best = (self._moment[i] - others + prior * self._first[i]) / (row[i] + prior)
                self._at[i] = max(0.0, best)


class Slope:
    """By how much a job takes longer beside one of the other kind, as a part of its time alone.

    That is the slope of a line through seconds over expected ones, by the part of its time that a job had
    company, over where the line begins: with a mistake in what is expected, both are off alike. For decode
    jobs, which have all degrees of company.
    """

    def __init__(self, first: float) -> None:
        """`first`: what it is before anything is known."""
        self.extra = first
        self._line = Line([(0.0, 1.0), (1.0, 1 + first)])
        """At first through a job without company, and one that had some all of its time."""

    def observe(self, beside: float, ratio: float) -> None:
        """A job took `ratio` times what was expected of it alone."""
        self._line.observe(beside, ratio)
        if self._line.variance > APART:
            slope = self._line.slope
            self.extra = min(MOST, max(0.0, slope / max(self._line.start(slope), 1 / MOST)))


class Mean:
    """The same for prefill jobs, which seldom are alone: what those with company all the time take, on
    average."""

    def __init__(self, first: float) -> None:
        """`first`: what it is before anything is known."""
        self.extra = first

    def observe(self, beside: float, ratio: float) -> None:
        """As of `Slope`."""
        if beside >= BESIDE:
            extra = max(0.0, (ratio - 1) / beside)
            self.extra += MEMORY * (extra - self.extra)


class Common:
    """Decode steps of all models: one fit of how they grow with the batch, and a factor for each model.

    What a model's own fit says of a lone sequence that was never seen is anybody's guess: of one checkpoint
    under four names twice as much for one as for another. From what was seen, though, all get there along the
    same line.
    """

    def __init__(self) -> None:
        self._fit = Fit(STEP)
        self._factors: dict[str, float] = {}
        """The first one's stays 1: what is seen of it is the fit's to explain."""

    def observe(self, model: str, features: Features, seconds: float, weight: float) -> None:
        """A step took so long, or would have with nothing beside it."""
        if not self._factors:
            self._factors[model] = 1.0
        usual = max(self._fit(features), SHORTEST)
        factor = self._factors.setdefault(model, seconds / usual if self._fit.seen >= ENOUGH else 1.0)
        self._fit.observe(features, seconds / factor, weight)
        if model != next(iter(self._factors)):
            self._factors[model] = factor + MEMORY * (seconds / usual - factor)

    def __call__(self, model: str, features: Features) -> float:
        """Seconds of such a step."""
        return self._factors.get(model, 1.0) * self._fit(features)


class Latency:
    """The fits of a unit's models."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str, str], Fit] = {}
        """By kind of job, "together" for decode jobs beside another, and model."""
        self._common = Common()
        self._neighbour: dict[str, Slope | Mean] = {"decode": Slope(EXTRA), "prefill": Mean(EXTRA)}
        """What a neighbour costs a job of that kind."""
        self._slower = 1.5
        """By how much a step takes longer beside those of another model."""
        self._least: dict[str, float] = {}
        """By model: seconds of the shortest steps of late."""
        self._seen_alone: dict[str, float] = {}
        """By model: seconds of a step of one or two sequences, as last seen with nothing beside it."""
        self._floor: dict[str, float] = {}
        """By model: seconds that a step takes at least."""
        self._context: dict[str, float] = {}
        """Tokens of a sequence that decodes, as last seen."""
        self._deepest: dict[str, float] = {}
        """Tokens that a token of a prompt attends to, on average over a job: most of late."""
        self._steps: dict[tuple[str, int, bool], float] = {}
        """What `step` said since the last observation."""
        self._lone: dict[str, float] = {}
        """The same of `lone_step`."""
        self._cycles: dict[tuple[int, tuple[tuple[str, int], ...]], Cycle] = {}
        """The same of `cycle`, by lanes and batches."""

    def observe(self, event: JobEnded) -> None:
        """Learn from a job."""
        seconds = event.seconds - self._prompts(event)
        if seconds <= LEAST_PART * event.seconds or event.steps < 1 or event.tokens < 1:
            return
        seconds /= event.steps
        self._steps.clear()
        self._lone.clear()
        self._cycles.clear()
        regime = "together" if event.kind == "decode" and event.together >= 0.5 else event.kind
        fit = self._fits.setdefault((regime, event.model), self._new(event.kind))
        features = self._features(event)
        if event.kind == "decode" and not event.prompts:
            if features[1] <= FEW and max(event.beside, event.together) < ALONE:
                known = self._seen_alone.setdefault(event.model, seconds)
                self._seen_alone[event.model] = known + NEWEST * (seconds - known)
            self._least[event.model] = min(seconds, self._least.get(event.model, seconds) * RISE)
            floor = LEAST_PART * seconds / (1 + EACH * features[1])
            before = self._floor.setdefault(event.model, floor)
            self._floor[event.model] = before + MEMORY * (floor - before)
        if fit.seen >= ENOUGH and not event.prompts and (alone := fit(features)) > 0:
            self._neighbour[event.kind].observe(event.beside, min(MOST, seconds / alone))
        seconds /= 1 + self._neighbour[event.kind].extra * event.beside
        weight = (JOINT if event.prompts else 1.0) * (1 - (1 - CONTENDED[event.kind]) * event.beside)
        fit.observe(features, seconds, weight)
        if regime == "together" and (lone := self._fits.get(("decode", event.model))) is not None:
            slower = min(MOST, max(1.0, seconds / max(lone(features), seconds / MOST)))
            self._slower += MEMORY * (slower - self._slower)
        if event.kind == "decode":
            apart = seconds / (self._slower if regime == "together" else 1.0)
            self._common.observe(event.model, features, apart, weight)

    def _prompts(self, event: JobEnded) -> float:
        """Seconds of a decode job that went into prompts: what they add to a pass, on the part of the device
        that it had."""
        if not event.prompts:
            return 0.0
        tokens = round(sum(event.prompts.values()))
        added = self.prefill(event.model, 1 + tokens) - self.prefill(event.model, 1)
        slower = 1 + self._neighbour["decode"].extra * event.beside
        return added * slower * (self._slower if event.together >= 0.5 else 1.0)

    def step(self, model: str, sequences: int, together: bool = False) -> float:
        """Seconds of a decode step of so many sequences of usual length, with nothing beside it, or with one
        of another model; with nothing beside it it takes no longer."""
        key = model, sequences, together
        if (seconds := self._steps.get(key)) is None:
            seconds = self._steps[key] = self._fitted_step(model, sequences, together)
        return seconds

    def _fitted_step(self, model: str, sequences: int, together: bool) -> float:
        context = self._context.get(model, 0.0)
        features = (1.0, float(sequences), sequences * context)
        this, other = ("together", "decode") if together else ("decode", "together")
        if (this, model) not in self._fits and ((other, model) in self._fits or not self._any(this)):
            seconds = self._fit(other, model)(features)
            return seconds * self._slower if together else seconds / self._slower
        seconds = self._fit(this, model)(features)
        if not together and (beside := self._fits.get(("together", model))) is not None:
            seconds = min(seconds, beside(features))
        return seconds

    def lone_step(self, model: str) -> float:
        """Seconds of a decode step of one sequence that has the device for itself: about as was seen.

        Where that never was, it follows from what was seen of all models (`Common`); but it takes less than
        any other step, and not much less.
        """
        if (lone := self._lone.get(model)) is None:
            lone = self._lone[model] = self._fitted_lone_step(model)
        return lone

    def _fitted_lone_step(self, model: str) -> float:
        fitted = self._common(model, (1.0, 1.0, self._context.get(model, 0.0)))
        floor = self._floor.get(model, fitted)
        lone = max(SHORTEST, min(self._least.get(model, fitted), max(floor, fitted)))
        if (seen := self._seen_alone.get(model)) is not None:
            lone = max((1 - AROUND) * seen, min((1 + AROUND) * seen, lone))
        return lone

    def prefill(self, model: str, tokens: int) -> float:
        """Seconds of a prefill job of so many tokens, with nothing beside it."""
        depth = min(tokens / 2, self._deepest.get(model, math.inf))
        return self._fit("prefill", model)((1.0, float(tokens), tokens * depth / 1e3))

    def prompt(self, model: str, seconds: float) -> int:
        """Tokens, without context, that a pass computes in so many seconds beyond what it takes anyway."""
        each = (self.prefill(model, LEAST) - self.prefill(model, 1)) / (LEAST - 1)
        return int(seconds / max(each, SHORTEST))

    def alone(self, model: str, prompt: int, output: int) -> float:
        """Seconds of a whole request that has the device for itself."""
        return self.prefill(model, prompt) + output * self.lone_step(model)

    def beside(self, kind: str) -> float:
        """By how much a job of that kind takes longer with one of the other kind beside it."""
        return 1 + self._neighbour[kind].extra

    def cycle(self, batches: Sequence[tuple[str, int]], lanes: int) -> Cycle:
        """The fastest way for models with so many sequences each to do one step each, so many at a time.

        A large batch beside a small one has too few cores, and the small one steps that nobody needs: the
        largest may be better off one after the other with all of them. Between those and the others, which
        run side by side, a lane waits for the other for half a step or so.
        """
        key = lanes, tuple(batches)
        if (cycle := self._cycles.get(key)) is None:
            cycle = self._cycles[key] = self._fastest_cycle(batches, lanes)
        return cycle

    def _fastest_cycle(self, batches: Sequence[tuple[str, int]], lanes: int) -> Cycle:
        alone = [self.step(name, count, False) for name, count in batches]
        if lanes == 1 or len(batches) < 2:
            return Cycle(sum(alone), frozenset())
        beside = [self.step(name, count, True) for name, count in batches]
        order = sorted(range(len(batches)), key=lambda i: -beside[i])
        first, rest = 0.0, sum(beside)
        best, exclusive = max(beside[order[0]], rest / lanes), 0
        for count, i in enumerate(order, 1):
            first += alone[i]
            rest -= beside[i]
            longest = beside[order[count]] if count < len(order) else 0.0
            seconds = first + max(longest, rest / lanes) + longest / 2
            if seconds < best * (BETTER if not exclusive else 1.0):
                best, exclusive = seconds, count
        return Cycle(best, frozenset(batches[i][0] for i in order[:exclusive]))

    def busy_cycle(self, batches: Sequence[tuple[str, int]], lanes: int) -> float:
        """The same while a prefill job runs, which has one of several lanes for itself."""
        if lanes == 1:
            return sum(self.step(name, count, False) for name, count in batches) * self.beside("decode")
        steps = [self.step(name, count, True) for name, count in batches]
        return max(max(steps, default=0.0), sum(steps) / (lanes - 1))

    def known(self, model: str) -> bool:
        """Whether jobs of both kinds of the model were observed."""
        decoded = ("decode", model) in self._fits or ("together", model) in self._fits
        return decoded and ("prefill", model) in self._fits

    def _features(self, event: JobEnded) -> Features:
        if event.kind == "prefill":
            depth = event.context + event.tokens / 2
            deepest = self._deepest.get(event.model, depth)
            self._deepest[event.model] = max(deepest * FORGET, min(deepest * DEEPER, depth))
            return 1.0, float(event.tokens), event.tokens * depth / 1e3
        sequences = event.tokens / event.steps
        self._context[event.model] = event.context / max(1.0, sequences)
        return 1.0, sequences, float(event.context)

    def _any(self, kind: str) -> bool:
        return any(of == kind for of, _ in self._fits)

    def _fit(self, kind: str, model: str) -> Fit:
        if (fit := self._fits.get((kind, model))) is not None:
            return fit
        others = (each for (of, _), each in self._fits.items() if of == kind)
        return max(others, key=lambda each: each.seen, default=_FIRST[kind])

    def _new(self, kind: str) -> Fit:
        return Fit(STEP if kind == "decode" else PREFILL)


_FIRST = {"decode": Fit(STEP), "together": Fit(STEP), "prefill": Fit(PREFILL)}
