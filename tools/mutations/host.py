"""Mutations of sums and optimiser in host memory: each loses noise, a part of a sum, or bits, without an error."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

HOST = ("tests/engines/test_host.py",)
COPIES = ("tests/engines/test_host_copies.py",)
OPTIMIZER = ("tests/engines/test_host_optimizer.py",)

_HOST = "dpft/engines/host.py"

HOST_MUTATIONS = (
    Mutation(
        "host_noise_dropped",
        "sums in host memory get no noise",
        _HOST,
        "noise.add_(total, std)",
        "pass",
        HOST,
    ),
    Mutation(
        "host_sum_replaced",
        "a physical batch replaces the sum of those before it",
        _HOST,
        "            if first:",
        "            if True:",
        HOST,
    ),
    Mutation(
        "host_sum_kept",
        "what was abandoned stays in the sum",
        _HOST,
        "        self._begun.clear()",
        "        pass",
        HOST,
    ),
    Mutation(
        "host_unused_parameter",
        "a parameter that no example used gets the last release again",
        _HOST,
        "                total.zero_()",
        "                pass",
        HOST,
    ),
    Mutation(
        "host_copy_not_awaited",
        "a buffer is read before its copy has ended",
        _HOST,
        "        wait()\n        then()",
        "        then()",
        COPIES,
    ),
    Mutation(
        "host_buffer_in_use",
        "a buffer is filled again while it is being copied",
        _HOST,
        "while len(self._travelling) >= BUFFERS:",
        "while len(self._travelling) > BUFFERS:",
        COPIES,
    ),
    Mutation(
        "host_masters_lost",
        "a resumed training loses the bits that bf16 does not have",
        _HOST,
        "if masters is None else masters[number])",
        "if True else masters[number])",
        OPTIMIZER,
    ),
    Mutation(
        "host_change_undone",
        "what else changed a parameter is undone by the next step",
        _HOST,
        "        part.copy_(torch.where(same, part, piece.to(part.dtype)))",
        "        pass",
        OPTIMIZER,
    ),
    Mutation(
        "host_not_alone",
        "the checks of a training of one process are left out",
        "dpft/engines/engine.py",
        'self.alone = kind == "single"',
        "self.alone = False",
        HOST,
    ),
)
