"""Optional parts that need another library: uvicorn, Prometheus, OpenTelemetry."""
