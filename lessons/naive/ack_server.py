"""ack_server.py without a limit on deliveries: a payload that crashes every consumer comes back forever.

Run `uvicorn lessons.naive.ack_server:app`.
"""

from lessons import ack_server

ack_server.MAX_DELIVERIES = 1_000_000_000
app = ack_server.app
