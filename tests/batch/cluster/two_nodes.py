"""A program: a Ray cluster of two nodes here. It says where; `lose` kills the second; it ends with its input."""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    node = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster()
    cluster.add_node(**node)
    second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    say(json.dumps({"address": cluster.address, "second": second.node_id}))
    for line in sys.stdin:
        if line.strip() == "lose":
            cluster.remove_node(second, allow_graceful=False)
            say("lost")
    cluster.shutdown()


main()
