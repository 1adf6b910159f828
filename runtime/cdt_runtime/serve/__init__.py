"""A small HTTP service: the answers of `cdt-infer` for tiles that are uploaded, and a page.

- guard: who may ask, how much and how long; the same for every path
- uploads: files of a request, on disk while it lasts
- engine: one thread for all engine calls; requests that come together share a batch
- scans: CTs that requests may name, and their tokens
- metrics: for Prometheus
- app: the paths
- cli: the command `cdt-serve`
"""
