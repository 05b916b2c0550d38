"""Placement that is computed: workloads, costs, estimators, algorithms. Pure: no gRPC, Redis or torch."""
