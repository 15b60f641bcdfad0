"""Harvest by several ranks, kill some, resume with other numbers of ranks, and compare. Run by test_ranks.py.

One process imports torch once and forks a child for every rank; it prints one JSON line. Given a URL, the stores are
below it and only the plain one is in a folder; whoever runs this compares them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import msgspec
import torch

from thresher.harvest import steps
from thresher.harvest.config import HarvestConfig
from thresher.harvest.model import forward
from thresher.harvest.model.plan import make_plan
from thresher.harvest.ranks import multi_process
from thresher.harvest.run import harvest
from thresher.harvest.tokens import encode
from thresher.harvest.tokens.packing import Context
from thresher.shared.core.cli import run_guarded
from thresher.shared.core.config import load_config
from thresher.shared.core.errors import NonFiniteError
from thresher.shared.store.format.layout import Header
from thresher.shared.store.format.manifest import ShardRecord
from thresher.shared.store.local import durable
from thresher.shared.store.local.staged_shards import stage_shard
from thresher.shared.store.remote.objects import RemoteStore
from thresher.shared.store.write import rank_store

Before = Callable[[int], Mapping[str, object] | None]


def harvest_guarded(config: HarvestConfig) -> int:
    """Harvest and return the exit code; 1 for a traceback."""
    try:
        return run_guarded(lambda: harvest(config) and 0)
    except BaseException:
        traceback.print_exc()
        return 1


def nothing(rank: int) -> None:
    """Do nothing to a rank."""


def start(config: HarvestConfig, world: int, before: Before, stderr: Path) -> list[int]:
    """Start ranks (one: without a launcher), each with the changes that `before(rank)` returns; return process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        os.setpgid(child, children[0] if children else child)  # 0 is oneself, so that both do it
        if not child:
            if world > 1:
                places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
                os.environ |= {key: str(value) for key, value in places.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                with stderr.open("a", buffering=1) as file, redirect_stderr(file):
                    code = harvest_guarded(msgspec.structs.replace(config, **(before(rank) or {})))
            finally:
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    """Wait until all have ended; return their exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def tree(path: Path) -> dict[str, bytes]:
    """Return every file and folder of a store."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in sorted(path.rglob("*"))}


class Scene:
    """Harvests of one configuration, each in a separate folder, compared with a plain one."""

    def __init__(self, toml: Path, url: str = "") -> None:
        self.folder = toml.parent
        self.stores: list[str] = []
        self.config = load_config(HarvestConfig, str(toml), [])
        self.url = ""
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.store = Path()
        make_plan(self.config)  # imports what every child would
        self.begin("plain")
        self.go_on(1)
        self.expected = tree(self.store)
        self.url = url

    def begin(self, name: str) -> None:
        """Make later harvests use a new store at the same relative path, because the path is stored in the store."""
        (self.folder / name).mkdir()
        os.chdir(self.folder / name)
        self.store = self.folder / name / "store"
        if self.url:
            self.stores.append(f"{self.url}/{name}")
            self.config = msgspec.structs.replace(self.config, store=self.stores[-1])

    def start(self, world: int, before: Before = nothing) -> list[int]:
        """Start ranks; return their process ids."""
        return start(self.config, world, before, self.stderr)

    def run(self, world: int, before: Before = nothing) -> list[int]:
        """Harvest with a number of ranks; return their exit codes."""
        return wait(self.start(world, before))

    def expect(self, codes: list[int], wanted: list[int], *words: str) -> None:
        """Record a problem unless ranks ended with these codes and messages."""
        said = self.stderr.read_text()
        if codes != wanted or "Traceback" in said or any(word not in said for word in words):
            self.problems.append(f"{self.store.parent.name}: ended with {codes}: {said}")

    @property
    def stderr(self) -> Path:
        """The stderr of all ranks, in one file."""
        return self.store.parent / "stderr"

    def go_on(self, world: int, before: Before = nothing) -> None:
        """Harvest to the end, and record a problem unless the store equals that of a plain harvest."""
        self.expect(self.run(world, before), [0] * world)
        self.compare()

    def compare(self) -> None:
        """Record a problem unless the store equals that of a plain harvest."""
        if not self.url and self.store.parent.name != "plain" and (found := tree(self.store)) != self.expected:
            keys = [key for key in found.keys() | self.expected.keys() if found.get(key) != self.expected.get(key)]
            self.problems.append(f"{self.store.parent.name}: differs in {sorted(keys)[:3]}")


def at_step(step: int, rank: int, signal_number: int, to_all: bool = False) -> Before:
    """Return what makes one rank send itself, or all, a signal just before its given step that reaches the disk."""

    def before(this: int) -> None:
        steps = itertools.count(1)
        if this == rank:
            target = 0 if to_all else os.getpid()
            durable.observer = lambda _: next(steps) == step and os.kill(target, signal_number)

    return before


def at_request(request: int, rank: int, to_all: bool = False) -> Before:
    """Return what kills one rank, or all, just before its given request to the server."""

    def before(this: int) -> None:
        if this == rank:
            requests = itertools.count(1)
            again = RemoteStore._again

            def counted(self: RemoteStore, what: str, attempt: Callable[[], object]) -> object:
                if next(requests) == request:
                    os.kill(0 if to_all else os.getpid(), signal.SIGKILL)
                return again(self, what, attempt)

            RemoteStore._again = counted

    return before


def numbers_of_ranks(scene: Scene) -> None:
    """Compare what 2 and 3 ranks write with what one process writes; note the rank and number of each shard."""
    for world in (2, 3):
        scene.begin(f"{world} ranks")
        made = scene.store.parent / "made"

        def note_shards(rank: int, made: Path = made) -> None:
            def stage(store: Path, header: Header, written: dict[str, Path], record: ShardRecord, work: Path) -> None:
                with made.open("a") as file:
                    file.write(f"{rank} {record.shard}\n")
                stage_shard(store, header, written, record, work)

            rank_store.stage_shard = stage

        scene.go_on(world, note_shards)
        scene.notes.append(made.read_text() if made.exists() else "")


def one_killed(scene: Scene) -> None:
    """Kill one rank, check that the others end by themselves, and resume with another number of ranks."""
    for world, lost, step, then in ((3, 1, 30, 2), (2, 0, 75, 3), (2, 1, 75, 1)):
        scene.begin(f"{world} ranks, {lost} killed at step {step}, then {then}")
        codes = scene.run(world, at_step(step, lost, signal.SIGKILL))
        scene.expect(codes, [-signal.SIGKILL if rank == lost else 2 for rank in range(world)])
        scene.notes.append(scene.stderr.read_text())
        if not any((scene.store / ".staged").iterdir()):
            scene.problems.append(f"{scene.store.parent.name}: nothing waits to be adopted")
        scene.go_on(then)


def extended(scene: Scene) -> None:
    """Extend a plain harvest of fewer rows with ranks, kill one of them, and let others finish it."""
    scene.begin("extended")
    whole = scene.config
    scene.config = msgspec.structs.replace(whole, tokens=400)
    scene.expect(scene.run(1), [0])
    scene.config = whole
    scene.expect(scene.run(2, at_step(30, 1, signal.SIGKILL)), [2, -signal.SIGKILL])
    scene.go_on(2)


def one_interrupted(scene: Scene) -> None:
    """End one rank by a signal, as a launcher does, and resume."""
    scene.begin("interrupted")
    codes = scene.run(2, at_step(40, 1, signal.SIGTERM))
    scene.expect(
        codes, [2, 130], "error: rank 0 stops: rank 1 failed: it was interrupted; ", "\nwarning: interrupted; "
    )
    scene.go_on(2)


def another_harvester(scene: Scene) -> None:
    """Stop one rank of two in the middle; start others meanwhile, which must be refused; then let it continue."""
    scene.begin("busy")
    ranks = scene.start(2, at_step(40, 1, signal.SIGSTOP))
    os.waitpid(ranks[1], os.WUNTRACED)
    scene.expect(scene.run(1), [2], "error: another process is writing to the store 'store'; wait until it ends")
    scene.expect(scene.run(2), [2, 2], "error: rank 1 stops with rank 0, which failed: another process is writing")
    os.kill(ranks[1], signal.SIGCONT)
    if wait(ranks) != [0, 0]:
        scene.problems.append(f"busy: the first ones ended badly: {scene.stderr.read_text()}")
    scene.compare()


def differences(scene: Scene) -> None:
    """Start ranks that differ from each other or fail."""
    scene.begin("another seed")
    codes = scene.run(2, lambda rank: {"seed": rank})
    scene.expect(codes, [2, 2], "error: rank 1 differs from rank 0 in seed (1, rank 0 0); use the same for all ranks")

    scene.begin("another processor")

    def other_processor(rank: int) -> None:
        multi_process.processor = lambda device: f"GPU {rank}"

    said = "error: rank 1 differs from rank 0 in processor ('GPU 1', rank 0 'GPU 0'); use the same for all ranks"
    scene.expect(scene.run(2, other_processor), [2, 2], said)

    scene.begin("another text")

    def read_less(rank: int) -> None:
        read = multi_process.read_contexts

        def changed(*arguments: object) -> Iterator[Context]:
            for context in read(*arguments):
                yield context._replace(tokens=context.tokens * (1 - rank))

        multi_process.read_contexts = changed

    words = (
        "rank 1 read 83 contexts with checksum",
        "of text, rank 0 83 contexts with",
        "error: rank 1 stops: rank 0 failed:",
    )
    scene.expect(scene.run(2, read_less), [2, 2], *words)

    scene.begin("a text that changes")
    path = next(path for path in sorted(Path(scene.config.dataset).rglob("*")) if path.is_file())
    before = path.read_bytes()

    def rewrite(rank: int) -> None:
        check = multi_process.check_unchanged

        def late(*arguments: object) -> None:
            path.write_bytes(before + b" more")
            check(*arguments)

        multi_process.check_unchanged = late

    codes = scene.run(2, rewrite)
    path.write_bytes(before)
    scene.expect(codes, [2, 2], "error: the text of", "changed while it was harvested", "is left unfinished")

    scene.begin("a rank that fails")

    def fail(rank: int) -> None:
        def run_model(*_: object) -> None:
            raise NonFiniteError("hook point 'x' is NaN")

        if rank:
            multi_process.run_model = run_model

    codes = scene.run(3, fail)
    said = "rank 0 stops: rank 1 failed: hook point 'x' is NaN;", "rank 0 stops: rank 2 failed: hook point 'x' is NaN;"
    if not any(line in scene.stderr.read_text() for line in said):
        scene.problems.append(f"nobody said why: {scene.stderr.read_text()}")
    scene.expect(codes, [2, 2, 2], "error: hook point 'x' is NaN")


def random_kills(scene: Scene, count: int = 20) -> None:
    """Kill a random rank, or all, at a random step, twice, and then finish with any number of them; note who died."""
    rng = random.Random(7)
    for number in range(count):
        scene.begin(f"{number}")
        for _ in range(2):
            world = rng.choice((1, 2, 3))
            lost = rng.randrange(world)
            step = rng.randrange(1, 300 if lost == 0 else 240 // world)  # rank 0 adopts and completes too
            codes = scene.run(world, at_step(step, lost, signal.SIGKILL, to_all=rng.random() < 0.5))
            scene.notes.append(f"{lost} of {world} at {step}: {codes}")
        scene.go_on(rng.choice((1, 2, 3)))


def on_a_server(scene: Scene) -> None:
    """Write objects with 2 and 3 ranks; kill the first before a request, another during work; resume with others."""
    for world in (2, 3):
        scene.begin(f"{world}-ranks")
        scene.go_on(world)
    for world, lost, before, then in (
        (2, 0, at_request(45, 0), 3),  # the first one uploads; 3 shards are there
        (3, 1, at_step(30, 1, signal.SIGKILL), 1),
    ):
        scene.begin(f"{world}-ranks-{lost}-killed")
        codes = scene.run(world, before)
        scene.expect(codes, [-signal.SIGKILL if rank == lost else 2 for rank in range(world)])
        scene.notes.append(scene.stderr.read_text())
        scene.go_on(then)


def teams(scene: Scene) -> None:
    """Harvest with teams of two processes that hold one model together; kill one, resume; refuse what does not fit."""
    whole, scene.expected = scene.config, {}
    scene.config = msgspec.structs.replace(whole, tensor_parallel=2)
    scene.begin("four processes")
    scene.expect(scene.run(4), [0] * 4, "stored 664 rows")
    scene.begin("a follower is killed")

    def die(rank: int) -> None:
        if rank == 1:
            capturing = forward.capturing

            @contextmanager
            def dying(*arguments: object) -> Iterator[Callable[[torch.Tensor], object]]:
                with capturing(*arguments) as read:
                    passes = itertools.count(1)
                    yield lambda tokens: os.kill(os.getpid(), signal.SIGKILL) if next(passes) == 9 else read(tokens)

            forward.capturing = dying

    codes = scene.run(2, die)
    scene.expect(codes, [2, -signal.SIGKILL], "error: rank 0 stops: another rank ended or cannot be reached; what was")
    scene.expect(scene.run(2), [0, 0], "stored 664 rows")

    scene.begin("a leader fails")

    def fail(rank: int) -> None:
        def append(*_: object) -> None:
            raise NonFiniteError("hook point 'x' is NaN")

        steps.append = append

    scene.expect(scene.run(2, fail), [2, 2], "error: hook point 'x' is NaN", "error: this process stops with the first")

    scene.begin("a process too many")
    scene.expect(scene.run(3), [2] * 3, "error: tensor_parallel is 2, but 3 processes were started, 3 on this machine")
    scene.begin("a hook point of which each holds a part")
    scene.config = msgspec.structs.replace(scene.config, hook_points=["blocks.0.attn_z"])
    scene.expect(scene.run(2), [2, 2], "error: the activation at 'blocks.0.attn_z' (model.layers.0.self_attn.o_proj)")


def random_kills_on_a_server(scene: Scene, count: int = 12) -> None:
    """Kill a random rank, or all, at a random step or request, twice, and then finish; note who died."""
    rng = random.Random(8)
    for number in range(count):
        scene.begin(f"{number}")
        for _ in range(2):
            world = rng.choice((1, 2, 2, 3, 3))
            lost = rng.choice((0, rng.randrange(world)))
            to_all = rng.random() < 0.5
            if lost == 0 and rng.random() < 0.7:
                what, before = "request", at_request(at := rng.randrange(1, 75), 0, to_all)
            else:
                what, before = "step", at_step(at := rng.randrange(1, 120), lost, signal.SIGKILL, to_all)
            codes = scene.run(world, before)
            scene.notes.append(f"{lost} of {world} at {what} {at}: {codes}")
        scene.go_on(rng.choice((1, 2, 3)))


QUICK = (numbers_of_ranks, one_killed, one_interrupted, extended, another_harvester, differences)


MODES = {
    "quick": QUICK,
    "random": (random_kills,),
    "quick-url": (on_a_server,),
    "teams": (teams,),
    "random-url": (random_kills_on_a_server,),
}


def main(toml: Path, mode: str, url: str = "") -> None:
    """Run some scenes and print their results."""
    durable.flush = lambda handle: None
    encode.MAX_BATCH_CHARACTERS = 1_000  # so that every rank tokenizes some of the text
    torch.set_num_threads(1)
    scene = Scene(toml, url)
    for play in MODES[mode]:
        play(scene)
    print(json.dumps({"problems": scene.problems, "notes": scene.notes, "stores": scene.stores}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
