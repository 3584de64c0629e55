"""What must be equal in two runs that are the same one."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

import instant_reward as ir


def plain(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_second"}
        for row in metrics
    ]


def weights(run: ir.Run) -> dict[str, list[Any]]:
    """The weights in the last checkpoint."""
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    return {name: one.tolist() for name, one in load_file(checkpoint / "policy" / "model.safetensors").items()}
