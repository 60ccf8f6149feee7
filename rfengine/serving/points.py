"""KeptPoints: the snapshots of one session, within a budget of memory, and the tree of its branches."""

from __future__ import annotations

from dataclasses import dataclass

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import PointKept
from rfengine.snapshot import Snapshot

MOST_BRANCHES = 10_000  # of a session


@dataclass(slots=True)
class BranchLine:
    """One branch: where it leaves its parent, and the index of the next chunk at its end."""

    parent_id: int | None
    tip: int


@dataclass(slots=True)
class AppliedChange:
    """A prompt change that is applied: the first chunk that shows it, and how many of its transition are to
    come; prompt_before is that of the chunks before them."""

    event_id: str
    prompt_before: str
    first_chunk: int
    chunks_left: int
    shown: bool = False


@dataclass(frozen=True, slots=True)
class KeptPoint:
    """A point; changes: those that are to show, or are in transition, in the chunks that follow."""

    kept: PointKept
    snapshot: Snapshot
    changes: tuple[AppliedChange, ...]
    nbytes: int


class KeptPoints:
    """The kept points of a session.

    most_bytes: of all snapshots together. Where an automatic point does not fit, every other automatic one is
    dropped and the distance between them doubles, so that they reach back over the whole session.
    """

    def __init__(self, most_bytes: int, keep_every: int) -> None:
        self.most_bytes = most_bytes
        self.keep_every = keep_every
        self.nbytes = 0
        self.branch_id = 0
        self.branches = [BranchLine(None, 0)]
        self._points: dict[int, KeptPoint] = {}
        self._next_id = 0

    def wants(self, chunk_index: int) -> bool:
        """Whether the point before this chunk is to be kept on its own account."""
        return self.keep_every > 0 and chunk_index % self.keep_every == 0

    def made(self, chunk_index: int) -> None:
        """A chunk was made on the present branch."""
        self.branches[self.branch_id].tip = chunk_index + 1

    def keep(
        self,
        snapshot: Snapshot,
        chunk_index: int,
        changes: tuple[AppliedChange, ...],
        automatic: bool,
        event_id: str | None = None,
    ) -> tuple[PointKept | None, list[int]]:
        """Keep a snapshot; returns the point and the ids of those that made room for it.

        An automatic point that never fits is None, and no other is tried. Raises ServiceError for an explicit
        one.
        """
        nbytes = sum(tensor.nbytes for tensor in snapshot.tensors.values())
        if self.nbytes + nbytes - self._droppable_bytes() > self.most_bytes:
            if automatic:
                self.keep_every = 0
                return None, []
            raise ServiceError(
                Fault(
                    "snapshot_budget",
                    f"the snapshot has {nbytes} bytes and those that are kept have {self.nbytes} of "
                    f"{self.most_bytes}; start another session, or ask for fewer snapshots",
                    status=429,
                )
            )
        dropped = self._make_room(nbytes)
        number, self._next_id = self._next_id, self._next_id + 1
        prompt = snapshot.info["prompt"]
        kept = PointKept(number, chunk_index, self.branch_id, prompt, automatic, event_id)
        self._points[number] = KeptPoint(kept, snapshot, changes, nbytes)
        self.nbytes += nbytes
        return kept, dropped

    def _automatic(self) -> list[int]:
        return [number for number, point in self._points.items() if point.kept.automatic]

    def _droppable_bytes(self) -> int:
        """Of all automatic points but the first."""
        return sum(self._points[number].nbytes for number in self._automatic()[1:])

    def _make_room(self, nbytes: int) -> list[int]:
        """Thin the automatic points out until `nbytes` more fit, which they do before none is left."""
        dropped: list[int] = []
        while self.nbytes + nbytes > self.most_bytes:
            for number in self._automatic()[1::2]:
                self.nbytes -= self._points.pop(number).nbytes
                dropped.append(number)
            self.keep_every *= 2
        return dropped

    def clear(self) -> None:
        """Drop all snapshots."""
        self._points.clear()
        self.nbytes = 0

    def move_to(self, snapshot_id: int, new_branch: bool) -> tuple[PointKept, int | None]:
        """Make the point the present one; returns it, and the parent of the branch on which it goes on.

        A branch of its own is begun where new_branch asks for it, and where the point's branch has gone on.
        Raises ServiceError as destination does.
        """
        point = self.destination(snapshot_id, new_branch)
        if self._begins_branch(point, new_branch):
            self.branches.append(BranchLine(point.kept.branch_id, point.kept.chunk_index))
            self.branch_id = len(self.branches) - 1
        else:
            self.branch_id = point.kept.branch_id
        return point.kept, self.branches[self.branch_id].parent_id

    def destination(self, snapshot_id: int, new_branch: bool) -> KeptPoint:
        """The kept point of that id, to which move_to can go. Raises ServiceError where there is none, or no
        branch can be begun."""
        if snapshot_id not in self._points:
            known = ", ".join(map(str, list(self._points)[-8:])) or "none yet"
            raise ServiceError(
                Fault(
                    "unknown_snapshot",
                    f"snapshot_id is {snapshot_id} and no such point is kept; the newest are: {known}",
                    status=404,
                    param="snapshot_id",
                )
            )
        point = self._points[snapshot_id]
        if self._begins_branch(point, new_branch) and len(self.branches) >= MOST_BRANCHES:
            raise ServiceError(
                Fault(
                    "too_many_branches",
                    f"the session has {len(self.branches)} branches; start another session for more",
                    status=429,
                )
            )
        return point

    def _begins_branch(self, point: KeptPoint, new_branch: bool) -> bool:
        return new_branch or self.branches[point.kept.branch_id].tip != point.kept.chunk_index
