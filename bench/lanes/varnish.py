"""Varnish before the plain handler: entries in memory, the token in the key."""

from pathlib import Path

from handler import PATH, SLOW_PATH, TTL_S

from lanes.plain import make

__all__ = ["command", "make", "missing"]

RULES = """
vcl 4.1;
backend origin {{ .host = "127.0.0.1"; .port = "{origin}"; }}
sub vcl_recv {{
    if (req.url ~ "^({cached})[?]") {{ return (hash); }}
    return (pass);
}}
sub vcl_hash {{ hash_data(req.http.Authorization); }}
sub vcl_backend_response {{ set beresp.ttl = {ttl}s; }}
sub vcl_deliver {{ set resp.http.Cache-Status = "varnish; hits=" + obj.hits; }}
"""


def missing(factory: str) -> str | None:
    """Return a message if Varnish is not installed."""
    return None if _program() else "Varnish is not installed (Debian: apt-get install varnish)"


def command(port: int, origin: int, folder: Path) -> list[str]:
    """Write the rules and return the command."""
    folder.chmod(0o755)
    rules = folder / "rules.vcl"
    rules.write_text(RULES.format(origin=origin, ttl=TTL_S, cached="|".join((PATH, SLOW_PATH))))
    options = {
        "-j": "none",
        "-a": f"127.0.0.1:{port}",
        "-f": str(rules),
        "-s": "malloc,256m",
        "-n": str(folder / "work"),
    }
    command = [_program() or "varnishd", "-F", "-p", "thread_pools=1", "-p", "thread_pool_min=80"]
    return [*command, *(word for pair in options.items() for word in pair)]


def _program() -> str | None:
    from machine import program_path

    return program_path("varnishd")
