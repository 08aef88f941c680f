"""`python -m moe_server` is `moe-server`."""

from moe_server.cli import main

main()
