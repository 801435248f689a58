"""What a traced step is made of, as it crosses from the process that traces it to the one that asked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

# Parts of a step beside its compiled functions.
HEAD, UPDATE, REST = "head and loss", "update", "rest"


@dataclass(frozen=True)
class Launch:
    """A kernel, launched once.

    Attributes:
        part: of the step.
        kind: product, attention, or elementwise (everything whose time is that of its bytes).
        n_bytes: read and written.
        flops: of products; of attention those of the causal half.
        is_narrow: it reads and writes 2-byte numbers one by one, as rows of an odd length make it.
        micro_step: from 0; the update belongs to the last.
    """

    part: str
    name: str
    kind: str
    n_bytes: int
    flops: int
    is_narrow: bool
    micro_step: int


@dataclass
class Trace:
    """What a step launches and holds.

    Attributes:
        launches: in order; of an update with more than two micro-steps only the first two.
        calls: part -> calls of its compiled function in a micro-step.
        peak_bytes: most that tensors hold.
        host_waits: what makes the host wait for the device, and where.
        graph_breaks: why a compiled function is cut in two.
        recompilations: why something is compiled again after the first step.
        code: name -> what the compiler wrote, in that order.
    """

    launches: list[Launch] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    host_waits: list[str] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    recompilations: list[str] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        values = json.loads(text)
        return cls(**values | {"launches": [Launch(**launch) for launch in values["launches"]]})

    @property
    def last_micro_step(self) -> int:
        return max(launch.micro_step for launch in self.launches)
