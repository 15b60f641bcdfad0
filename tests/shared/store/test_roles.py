"""Roles: what is stored of them, masks by position, and statistics of some roles alone."""

from __future__ import annotations

import pickle
import shutil

import msgspec
import numpy as np
import pytest
import torch
import zarr

from thresher.shared import ActivationStore
from thresher.shared.core.errors import ConfigError, StoreError
from thresher.shared.store import ActivationStoreWriter
from thresher.shared.store.format.layout import make_header
from thresher.shared.store.format.manifest import Manifest, encode_line, parse_manifest
from thresher.shared.store.format.roles import ASSISTANT, PLACED, USER, role_codes
from thresher.shared.store.read.inspect import describe_store
from thresher.shared.store.write.rank_writer import RankWriter

CONTEXT, D_IN, N, HOOK = 6, 5, 40, "blocks.0.resid_post"


@pytest.fixture(scope="module", params=["none", "int8"])
def written(request, tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 2, (N, CONTEXT, D_IN)).astype(np.float32)
    tokens = rng.integers(0, 9, (N, CONTEXT))
    roles = rng.integers(0, 8, (N, CONTEXT))
    held_out = rng.random(N) < 0.3
    path = tmp_path_factory.mktemp("roles") / "store"
    sizes = {"chunk_bytes": 17 * D_IN * 4, "shard_bytes": 90 * D_IN * 4}
    with ActivationStoreWriter(
        path, {HOOK: D_IN}, CONTEXT, dtype="float32", codec=request.param, mask_token_ids=[3], roles=True, **sizes
    ) as writer:
        for start in range(0, N, 7):
            part = slice(start, start + 7)
            writer.append({HOOK: rows[part]}, tokens[part], held_out=held_out[part], roles=roles[part])
    return path, tokens.reshape(-1), roles.reshape(-1), np.repeat(held_out, CONTEXT)


def test_roles_are_stored_and_read_by_zarr(written):
    path, _, roles, _ = written
    store = ActivationStore.open(path)
    assert store.verify() == []
    assert store.roles(5, 200).tolist() == roles[5:200].tolist()
    assert np.array_equal(zarr.open_group(path, mode="r")["roles"][:], roles)
    assert "by role     text " in "\n".join(describe_store(store))
    assert store.training_rows_by_role()["placed"] == 0


@pytest.mark.parametrize("names", [None, ["assistant"], ["user", "marker", "assistant"]])
def test_masks_counts_and_moments_are_of_the_roles_asked_for(written, names):
    path, tokens, roles, held_out = written
    store = ActivationStore.open(path, roles=names)
    wanted = roles != PLACED if names is None else np.isin(roles, role_codes(names))
    usable = wanted & (tokens != 3)
    assert np.array_equal(store.row_mask(0, store.n_rows), usable)
    assert np.array_equal(store.row_mask(11, 101), usable[11:101])
    training = usable & ~held_out
    assert np.array_equal(store.training_mask(0, store.n_rows), training)
    starts = range(0, store.n_rows, store.chunk_rows)
    assert store.training_rows_per_chunk().tolist() == [int(training[s : s + store.chunk_rows].sum()) for s in starts]
    x = store.read(HOOK, 0, store.n_rows).double().numpy()[training]
    moments = store.moments(HOOK)
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-10)
    np.testing.assert_allclose(moments.variance, x.var(0), rtol=1e-10)
    np.testing.assert_allclose(moments.mean_norm, np.linalg.norm(x, axis=1).mean(), rtol=1e-10)


def test_a_pickled_store_keeps_its_limit(written):
    store = pickle.loads(pickle.dumps(ActivationStore.open(written[0], roles=["user"])))
    assert store.used_roles == ("user",)
    assert store.row_mask(0, store.n_rows).sum() == ((written[2] == USER) & (written[1] != 3)).sum()


def test_an_unfinished_store_has_the_same_statistics(written, tmp_path):
    path, tokens, roles, held_out = written
    whole = ActivationStore.open(path, roles=["assistant"])
    lines = (path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    copy = tmp_path / "store"
    shutil.copytree(path, copy)
    (copy / "manifest.jsonl").write_bytes(b"".join(lines[:-1]))
    part = ActivationStore.open(copy, roles=["assistant"])
    assert not part.complete
    assert np.array_equal(part.moments(HOOK).mean, whole.moments(HOOK).mean)
    assert part.training_rows_by_role()["assistant"] == int(((roles == ASSISTANT) & (tokens != 3) & ~held_out).sum())


def test_refusals(written, tmp_path):
    with pytest.raises(ConfigError, match="got 'asistant'"):
        ActivationStore.open(written[0], roles=["asistant"])
    with pytest.raises(ConfigError, match="expected roles to be a list"):
        ActivationStore.open(written[0], roles=[])
    rows = {HOOK: torch.zeros(1, CONTEXT, D_IN)}
    with ActivationStoreWriter(tmp_path / "with", {HOOK: D_IN}, CONTEXT, roles=True) as writer:
        with pytest.raises(ConfigError, match="with roles; got a batch with none"):
            writer.append(rows)
        with pytest.raises(ConfigError, match="roles of 0 to 7, got 0 to 8"):
            writer.append(rows, roles=np.arange(3, 9)[None].clip(0, 8) * (np.arange(CONTEXT) > 2))
        writer.append(rows, roles=np.ones((1, CONTEXT), int))
    with ActivationStoreWriter(tmp_path / "without", {HOOK: D_IN}, CONTEXT) as writer:
        with pytest.raises(ConfigError, match="with no roles; got a batch with roles"):
            writer.append(rows, roles=np.ones((1, CONTEXT), int))
        writer.append(rows)
    with pytest.raises(StoreError, match="has no roles"):
        ActivationStore.open(tmp_path / "without", roles=["user"])
    assert ActivationStore.open(tmp_path / "without").roles(0, 2) is None


def test_an_older_store_may_have_a_hook_point_named_roles():
    options = dict(dtype="float32", codec="none", codec_level=None, mask_token_ids=[], metadata={}, n_contexts=None)
    sizes = dict(has_tokens=False, chunk_bytes=64, shard_bytes=640)
    with pytest.raises(ConfigError, match="'roles' cannot name an array"):
        make_header({"roles": 4}, 4, **options, **sizes)
    header = make_header({"other": 4}, 4, **options, **sizes)
    older = msgspec.structs.replace(header, hook_points={"roles": 4})
    found = parse_manifest(encode_line(older, 0)[0])
    assert isinstance(found, Manifest)
    assert found.header == older


class Alone:
    """A group of one rank."""

    rank, n = 0, 1

    def lead(self, action):
        return action()

    def check(self):
        """Do nothing: there is no other rank."""


def test_ranks_and_a_resumed_writer_write_the_same_bytes(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(N, CONTEXT, D_IN)).astype(np.float32)
    tokens, roles = rng.integers(0, 9, (N, CONTEXT)), rng.integers(0, 8, (N, CONTEXT))
    settings = {"roles": True, "n_contexts": N, "chunk_bytes": 17 * D_IN * 2, "shard_bytes": 90 * D_IN * 2}

    def give(writer, start, stop):
        writer.append({HOOK: rows[start:stop]}, tokens[start:stop], roles=roles[start:stop])

    def files(name):
        paths = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path / name): path.read_bytes() for path in paths}

    with ActivationStoreWriter(tmp_path / "whole", {HOOK: D_IN}, CONTEXT, **settings) as writer:
        give(writer, 0, N)
    writer = ActivationStoreWriter(tmp_path / "resumed", {HOOK: D_IN}, CONTEXT, **settings)
    give(writer, 0, 33)
    writer.abandon()
    with ActivationStoreWriter(tmp_path / "resumed", {HOOK: D_IN}, CONTEXT, **settings) as writer:
        assert 0 < writer.n_committed_contexts < 33
        give(writer, writer.n_committed_contexts, N)
    writer = RankWriter(tmp_path / "ranks", {HOOK: D_IN}, CONTEXT, group=Alone(), **settings)
    for part in writer.assignment.parts(0, N):
        give(writer, part.start, part.stop)
    writer.close()
    assert writer.adopt() == N
    writer.complete()
    writer.release()
    assert files("whole") == files("resumed") == files("ranks")
