"""Which agents of torchrun have begun a run: those alone may go on with it by themselves when they start the
ranks again. Others, which found the run there, have refused it once and refuse it again."""

from __future__ import annotations

import json
from pathlib import Path

from rfengine.files import read_text, strict_json, write_text
from rfengine.torchrun import own_agent
from rfengine.training.parallel import Ranks

_FILE = ".agents.json"
_LIMIT_BYTES = 10_000_000


def note_agents(run: Path, ranks: Ranks) -> None:
    """Write the agents of all ranks into the directory of a run. Every rank has to call it. Raises
    OSError."""
    agents = sorted(set(ranks.gathered(own_agent())) - {""})
    if agents and ranks.rank == 0:
        write_text(run / _FILE, json.dumps(agents, indent=1) + "\n")


def is_own_run(run: Path, ranks: Ranks) -> bool:
    """Whether an agent of one of these ranks has begun the run or gone on with it before. Every rank has to
    call it."""
    known = ranks.gathered(_noted(run) if ranks.rank == 0 else [])[0]
    return bool({*known} & {*ranks.gathered(own_agent())} - {""})


def _noted(run: Path) -> list[str]:
    """The agents noted in the directory of a run; none where there is no note or it is damaged."""
    try:
        agents = strict_json(read_text(run / _FILE, _LIMIT_BYTES))
    except ValueError:
        return []
    return [agent for agent in agents if isinstance(agent, str)] if isinstance(agents, list) else []
