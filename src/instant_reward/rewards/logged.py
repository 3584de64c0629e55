"""The reward that a log has of a decision: known for the action that was taken then, and for no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from instant_reward.rewards.base import Reward, as_reward, reward
from instant_reward.types import UserError, View


def logged(action: str = "action", column: str = "reward") -> Reward:
    """Pays what the log says, where a text is the logged action; of other texts it says nothing.

    Args:
        action: the column with the action that was taken; column: the one with what it earned.
    """

    @reward(every="end", name="logged")
    def of_log(view: View) -> float | None:
        return float(view.info[column]) if view.text == view.info[action] else None

    return as_reward(of_log)


def number_in(row: Mapping[str, Any], column: str, where: str, highest: float = math.inf) -> float:
    """A number of a log; one that has a highest value must lie above 0.

    Raises:
        UserError: names the row and the column.
    """
    low = -math.inf if highest == math.inf else 0.0
    try:
        value = float(row[column])
    except KeyError:
        raise UserError(f"{where} has no column {column!r}; name the columns of the log in data.logged") from None
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or not low < value <= highest:
        wanted = "a finite number" if highest == math.inf else f"above 0 and at most {highest:g}"
        raise UserError(f"{where} has {row[column]!r} in its column {column!r}; it must be {wanted}")
    return value
