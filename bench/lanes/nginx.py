"""nginx with proxy_cache before the plain handler: one worker, one fill at a time, no log."""

import os
from pathlib import Path

from handler import PATH, SLOW_PATH, TTL_S

from lanes.plain import make

__all__ = ["command", "make", "missing"]

CONFIGURATION = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
worker_processes 1;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    open_file_cache max=1000 inactive=1h;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_cache_path {folder}/cache levels=1:2 keys_zone=items:10m inactive=1h use_temp_path=off;
    upstream origin {{ server 127.0.0.1:{origin}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
        location ~ ^({cached})$ {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_cache items;
            proxy_cache_key $http_authorization$request_uri;
            proxy_cache_valid 200 {ttl};
            proxy_cache_lock on;
            add_header Cache-Status "nginx; $upstream_cache_status";
        }}
    }}
}}
"""


def missing(factory: str) -> str | None:
    """Return a message if nginx is not installed."""
    return None if _program() else "nginx is not installed (Debian: apt-get install nginx-light)"


def command(port: int, origin: int, folder: Path) -> list[str]:
    """Write the configuration and return the command."""
    user = "user root;" if os.getuid() == 0 else ""
    text = CONFIGURATION.format(
        folder=folder,
        port=port,
        origin=origin,
        user=user,
        ttl=TTL_S,
        cached="|".join((PATH, SLOW_PATH)),
    )
    path = folder / "nginx.conf"
    path.write_text(text)
    return [_program() or "nginx", "-e", str(folder / "error.log"), "-c", str(path)]


def _program() -> str | None:
    from machine import program_path

    return program_path("nginx")
