"""Benchmarks: a load generator, CPU times of processes, and a comparison of an application with and
without its cache."""
