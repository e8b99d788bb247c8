"""How requests are spread over the generators' replicas, and how many of those there are.

Serve runs these in its own processes, which import nothing of this project by name: what is here
travels by value.
"""

import math
from collections import Counter
from typing import Any
from weakref import finalize

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

UNFINISHED = "unfinished_requests"


class FewestExpectedTokens(RequestRouter):
    """Sends a call to the replica that, of what this caller has sent, has the fewest tokens left to
    answer for: prompts and the longest answers allowed, until the call ends.

    Every caller balances its own calls, so that their sum is balanced too.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once by Serve."""
        self._charges: dict[str, tuple[ReplicaID, int]] = {}
        self._sought: dict[str, tuple[ReplicaID, int]] = {}  # of calls that no replica took yet

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas from the least to the most charged; the first that has room gets the call."""
        charged: Counter[ReplicaID] = Counter()
        name = "" if pending_request is None else pending_request.metadata.internal_request_id
        # A copy: a call may end, in any thread, while they are counted.
        for call, (replica_id, tokens) in (self._charges | self._sought).items():
            if call != name:
                charged[replica_id] += tokens
        ranked = sorted(candidate_replicas, key=lambda replica: charged[replica.replica_id])
        if pending_request is not None and ranked:
            # Charged before it is sent, so that calls that come together do not all go there; for
            # as long as Serve seeks a replica for it, which a cancelled call ends.
            if name not in self._sought:
                finalize(pending_request, self._sought.pop, name, None)
            self._sought[name] = (ranked[0].replica_id, _expected(pending_request))
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Charge the replica that took the call, which may not be the first choice."""
        name = pending_request.metadata.internal_request_id
        self._sought.pop(name, None)
        self._charges[name] = (replica_id, _expected(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Take a call that has ended off its replica's charges; one that its first choice turned
        away is another's."""
        if self._charges.get(internal_request_id, (None, 0))[0] == replica_id:
            del self._charges[internal_request_id]


def _expected(call: PendingRequest) -> int:
    return expected_tokens([*call.args, *call.kwargs.values()])


def expected_tokens(arguments: list[Any]) -> int:
    """Tokens that a call of `generate` or `stream` with these arguments may take up: of prompts,
    and of answers that are as long as they may be."""
    prompts = [
        request.prompt
        for argument in arguments
        for request in (argument if isinstance(argument, list | tuple) else [argument])
        if hasattr(request, "prompt")
    ]
    longest = sum(getattr(argument, "max_new_tokens", 0) for argument in arguments)
    return sum(len(prompt) + longest for prompt in prompts)


class ReplicasForRequests:
    """Serve's autoscaling policy: as many replicas as all unfinished requests fill batches."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, which Serve keeps within bounds and delays, and nothing to keep."""
        found = context.aggregated_metrics.get(UNFINISHED, {})
        requests = sum(found.values()) + context.total_queued_requests
        return max(1, math.ceil(requests / self._batch)), {}
