"""Models in folders: loaded bit for bit, of the classes that are ours, and refused where they lie."""

import errno
import inspect
import json
import resource
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import long
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_damage import LIES, sum_again
from torch import nn

import cemb
from cemb import files
from cemb.model import BIASES, COMPRESSED_TABLES, TABLES, PairModel, build_compressed_model, build_model
from cemb.tables import (
    ClusteredEmbedding,
    FullEmbedding,
    FusedFullEmbedding,
    HashedEmbedding,
    HashedEmbeddingBag,
    HybridEmbedding,
    LowRankEmbedding,
    MixedDimensionEmbedding,
    MultiHashEmbedding,
    ProductQuantizedEmbedding,
    QuotientRemainderEmbedding,
    ReferenceHashedEmbedding,
    RowQuantizedEmbedding,
    TransformCodedEmbedding,
    all_rows,
    num_bytes,
)
from cemb.tables.transform_coded import tier_borders
from cemb.vectors import balanced

NUM_WORDS, DIM = 290, 12
WORDS = [f"w{i}" for i in range(NUM_WORDS - 2)] + ["line\nbreak", "日本"]


def vectors(seed=0):
    return torch.randn(NUM_WORDS, DIM, generator=torch.Generator().manual_seed(seed))


def transform_coded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(9, (len(tier_borders(NUM_WORDS)) - 1, DIM), generator=generator)
    return TransformCodedEmbedding.from_vectors(vectors(seed), torch.ones(DIM), bits.to(torch.uint8))


QUANTIZED = {
    "int8": lambda seed=0: RowQuantizedEmbedding.from_vectors(vectors(seed)),
    "int4": lambda seed=0: RowQuantizedEmbedding.from_vectors(vectors(seed), 4),
    "product": lambda seed=0: ProductQuantizedEmbedding.from_vectors(vectors(seed), 5),
    "transform": transform_coded,
}


def trained(kind, bias="none", shared_table=False, **options):
    """A model whose values are at random, its hashes and clusters not those of a new one."""
    torch.manual_seed(1)
    if kind in COMPRESSED_TABLES:
        model = build_compressed_model(kind, NUM_WORDS, DIM, 4 * NUM_WORDS * DIM)
        model = PairModel(model.word_table, model.context_table, bias=bias, dropout=0.25)
    elif kind in TABLES:
        hashed = {"pool_size": 500, "block_size": 5, "hash_seed": 7, "signed": True}
        options = (hashed if "hashed" in kind else {}) | options
        model = build_model(
            kind, NUM_WORDS, DIM, shared_table=shared_table, bias=bias, dropout=0.25, **options
        )
    elif kind in QUANTIZED:
        model = PairModel(
            QUANTIZED[kind](), None if shared_table else QUANTIZED[kind](1), bias=bias, dropout=0.25
        )
    if kind == "clustered":
        model.word_table.recluster()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def check_same(found, model):
    state, expected = found.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert str(found) == str(model)
    assert num_bytes(found) == num_bytes(model)


def check_same_pairs(found, model):
    for side, expected in zip(found.factors(), model.factors(), strict=True):
        assert torch.equal(side, expected)
    pairs = torch.randint(NUM_WORDS, (200, 2))
    for is_training in (True, False):
        scores = []
        for each in (found.train(is_training), model.train(is_training)):
            torch.manual_seed(5)
            scores.append(each(pairs))
        assert torch.equal(*scores)
    assert found.num_parameters == model.num_parameters
    assert found.has_pair_step == model.has_pair_step
    assert (found.context_bias is found.word_bias) == (model.context_bias is model.word_bias)
    assert (found.context_table is found.word_table) == (model.context_table is model.word_table)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shared_table", [False, True])
@pytest.mark.parametrize("kind", [*TABLES, *COMPRESSED_TABLES, *QUANTIZED])
def test_a_model_is_loaded_bit_for_bit(tmp_path, kind, shared_table, bias):
    model = trained(kind, bias, shared_table)
    cemb.save(tmp_path / "model", model, WORDS, details={"note": ["ü", 1.5, None]})
    generator = torch.get_rng_state()
    found = cemb.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), generator)
    assert found.words == WORDS
    assert found.manifest["details"] == {"note": ["ü", 1.5, None]}
    check_same(found.model, model)
    check_same_pairs(found.model, model)
    # Values shared are stored once, so that the file holds little but what the model is said to take.
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < num_bytes(model) + 3000
    cemb.save(tmp_path / "again", found.model, found.words, details={"note": ["ü", 1.5, None]})
    for path in sorted((tmp_path / "model").iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("num_examples", [30, *long(500)])
def test_tables_of_any_size_are_loaded_bit_for_bit(tmp_path, num_examples):
    rows, dims = st.integers(1, 40), st.integers(1, 9)
    count = 0

    @settings(max_examples=num_examples, deadline=None)
    @given(
        st.sampled_from(sorted({*TABLES, *COMPRESSED_TABLES, "int8", "int4", "transform"})),
        rows,
        dims,
        st.data(),
    )
    def check(kind, num_rows, dim, data):
        nonlocal count
        count += 1
        values = torch.randn(num_rows, dim)
        if kind in ("int8", "int4"):
            table = RowQuantizedEmbedding.from_vectors(values, int(kind[3]))
        elif kind == "transform":
            bits = torch.randint(9, (len(tier_borders(num_rows)) - 1, dim)).to(torch.uint8)
            table = TransformCodedEmbedding.from_vectors(values, torch.ones(dim), bits)
        elif kind in COMPRESSED_TABLES:
            budget = data.draw(st.integers(400, 8000))
            try:
                table = COMPRESSED_TABLES[kind].within(num_rows, dim, budget, seed=3)
            except ValueError:
                return
        elif "hashed" in kind:
            block = data.draw(st.integers(1, dim))
            options = {"block_size": block, "hash_seed": data.draw(st.integers(0, 2**62))}
            options["padding_idx"] = data.draw(st.sampled_from([None, 0, num_rows - 1]))
            table = TABLES[kind](num_rows, dim, pool_size=data.draw(st.integers(block, 99)), **options)
        else:
            table = TABLES[kind](
                num_rows, dim, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))
            )
        words = [str(i) for i in range(num_rows)]
        cemb.save(tmp_path / str(count), table, words, details={})
        found = cemb.load(tmp_path / str(count))
        check_same(found.model, table)
        assert type(found.model) is type(table)
        assert torch.equal(all_rows(found.model), all_rows(table))
        assert np.array_equal(found.vectors().values, all_rows(table).numpy())

    check()


SIZES = {"num_embeddings": 40, "embedding_dim": 6}
OF_TORCH = {"padding_idx": 1, "max_norm": 2.0, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": True}
HASHED = {
    "pool_size": 30,
    "block_size": 2,
    "hash_seed": 5,
    "signed": True,
    "table_offset": 3,
    "padding_idx": 1,
}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FullEmbedding, {"init_std": 0.3, **OF_TORCH}),
        (FusedFullEmbedding, {"init_std": 0.3, **OF_TORCH}),
        (HashedEmbedding, {"init_std": 0.3, **HASHED}),
        (ReferenceHashedEmbedding, {"init_std": 0.3, **HASHED}),
        (
            HybridEmbedding,
            {
                "num_exact": 7,
                "pool_size": 30,
                "block_size": 2,
                "hash_seed": 5,
                "signed": True,
                "init_std": 0.3,
            },
        ),
        (MixedDimensionEmbedding, {"base_dim": 2.5, "temperature": 0.7, "init_std": 0.3}),
        (QuotientRemainderEmbedding, {"num_remainders": 7, "init_std": 0.3}),
        (MultiHashEmbedding, {"num_components": 7, "num_hashes": 3, "hash_seed": 5, "init_std": 0.3}),
        (LowRankEmbedding, {"rank": 2, "init_std": 0.3}),
        (ClusteredEmbedding, {"num_clusters": 7, "num_columns": 3, "init_std": 0.3}),
        (RowQuantizedEmbedding, {"bits": 4}),
        (ProductQuantizedEmbedding, {"num_groups": 5}),
        (TransformCodedEmbedding, {"num_code_bytes": 99}),
    ],
)
def test_arguments_are_those_that_were_given(kind, arguments):
    assert kind(**SIZES, **arguments).arguments == {**SIZES, **arguments}
    # All of them are, but for what hashed tables refuse, what gives values, and what has become a value.
    parameters = set(inspect.signature(kind).parameters) - {
        "kwargs",
        "weight",
        "compression_ratio",
        "device",
        "dtype",
    }
    if issubclass(kind, HashedEmbedding):
        parameters -= {"max_norm", "norm_type", "scale_grad_by_freq", "sparse"}
    if kind is ClusteredEmbedding:
        parameters -= {"hash_seed"}
    assert parameters <= {*SIZES, *arguments}


def test_arguments_make_a_table_of_the_same_shape():
    for kind in (*TABLES, *COMPRESSED_TABLES, *QUANTIZED):
        table = trained(kind).word_table
        assert json.loads(json.dumps(table.arguments)) == table.arguments
        torch.manual_seed(3)
        again = type(table)(**table.arguments)
        assert again.arguments == table.arguments
        for name, value in table.state_dict().items():
            assert (again.state_dict()[name].shape, again.state_dict()[name].dtype) == (
                value.shape,
                value.dtype,
            )
        assert not any(
            torch.equal(value, table.state_dict()[name]) for name, value in again.named_parameters()
        )
        again.load_state_dict(table.state_dict())
        assert torch.equal(all_rows(again), all_rows(table))


def test_a_loaded_model_can_be_trained(tmp_path):
    model = trained("hashed")
    cemb.save(tmp_path / "model", model, WORDS, details={})
    found = cemb.load(tmp_path / "model").model
    pairs = torch.randint(NUM_WORDS, (100, 2))
    for each in (model, found):
        torch.manual_seed(0)
        optimizer = cemb.optim.Adam(each.parameters(), lr=0.1)
        each(pairs).square().mean().backward()
        optimizer.step()
    assert torch.equal(found.word_table.weight, model.word_table.weight)
    assert found.context_table.weight is found.word_table.weight


def test_vectors_of_words_and_contexts(tmp_path):
    for kind in ("full", "full-fused", "hashed", "low-rank", "transform"):
        model = trained(kind)
        cemb.save(tmp_path / kind, model, WORDS, details={})
        found = cemb.load(tmp_path / kind)
        words, contexts = (side.detach().numpy() for side in model.factors())
        expected = {
            (False, False): words,
            (False, True): contexts,
            (True, False): balanced(words, contexts),
            (True, True): balanced(contexts, words),
        }
        for (is_balanced, of_contexts), values in expected.items():
            seen = found.vectors(is_balanced, contexts=of_contexts)
            assert seen.words == WORDS
            assert seen.values.dtype == np.float32
            assert np.array_equal(seen.values, values)
    cemb.save(tmp_path / "alone", QUANTIZED["int8"](), WORDS, details={})
    alone = cemb.load(tmp_path / "alone")
    for options in ({"balanced": True}, {"contexts": True}):
        with pytest.raises(ValueError, match="a RowQuantizedEmbedding alone has no contexts"):
            alone.vectors(**options)
    uneven = PairModel(FullEmbedding(NUM_WORDS, DIM), FullEmbedding(5, DIM))
    cemb.save(tmp_path / "uneven", uneven, WORDS, details={})
    assert cemb.load(tmp_path / "uneven").vectors(True).values.shape == (NUM_WORDS, DIM)
    with pytest.raises(ValueError, match="there are 5 contexts, which are not the 290 words"):
        cemb.load(tmp_path / "uneven").vectors(contexts=True)


def test_vectors_of_one_side_are_made_alone(tmp_path):
    model = trained("transform")
    cemb.save(tmp_path / "model", model, WORDS, details={})
    found = cemb.load(tmp_path / "model")
    found.model.context_table.forward = lambda ids: pytest.fail("these are not wanted")
    assert np.array_equal(found.vectors().values, all_rows(model.word_table))
    found = cemb.load(tmp_path / "model")
    found.model.word_table.forward = lambda ids: pytest.fail("these are not wanted")
    assert np.array_equal(found.vectors(contexts=True).values, all_rows(model.context_table))


class OwnEmbedding(FullEmbedding):
    pass


class OwnModel(PairModel):
    def forward(self, pairs):
        return 2 * super().forward(pairs)


def tied():
    word_table, context_table = FullEmbedding(3, 2), FullEmbedding(3, 2)
    context_table.weight = word_table.weight
    return PairModel(word_table, context_table)


@pytest.mark.parametrize(
    ("model", "words", "details", "what"),
    [
        (
            lambda: nn.Embedding(3, 2),
            "abc",
            {},
            "tables are of FullEmbedding, .*, and this one is a Embedding",
        ),
        (lambda: OwnEmbedding(3, 2), "abc", {}, "this one is a OwnEmbedding"),
        (lambda: PairModel(FullEmbedding(3, 2), nn.Embedding(3, 2)), "abc", {}, "this one is a Embedding"),
        (lambda: HashedEmbeddingBag(3, 2, pool_size=9), "abc", {}, "this one is a HashedEmbeddingBag"),
        (lambda: nn.Linear(3, 2), "abc", {}, "this one is a Linear"),
        (lambda: OwnModel(FullEmbedding(3, 2)), "abc", {}, "PairModel itself, .* this one is a OwnModel"),
        (tied, "abc", {}, "share values in another way"),
        (lambda: FullEmbedding(3, 2), "ab", {}, "a model of 3 words needs a name for each, got 2"),
        (lambda: FullEmbedding(3, 2), "aba", {}, "got 3, of which 2 are distinct"),
        (lambda: FullEmbedding(3, 2), ["a", "b", 3], {}, "words must be texts, and one is 3"),
        (lambda: FullEmbedding(3, 2), ["a", "b", "\ud800"], {}, "surrogates not allowed"),
        (lambda: FullEmbedding(3, 2), "abc", {"gap": float("nan")}, "not JSON compliant"),
        (
            lambda: HashedEmbedding(2, 2**20 + 1, pool_size=9),
            "ab",
            {},
            "embedding_dim must be at most 1048576",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, model, words, details, what):
    with pytest.raises(ValueError, match=what):
        cemb.save(tmp_path / "model", model(), words, details=details)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left(tmp_path):
    cemb.save(tmp_path / "model", FullEmbedding(3, 2), "abc", details={})
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model' exists already"):
        cemb.save(tmp_path / "model", FullEmbedding(3, 2), "abc", details={})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # see test_cli
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(
            OSError, match=f"a file is too large while writing '{tmp_path / 'model'}'"
        ) as error:
            cemb.save(tmp_path / "model", FullEmbedding(300, 2), list(map(str, range(300))), details={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def told(folder):
    """Every place of a manifest, as the list of its keys."""
    manifest = json.loads((folder / "manifest.json").read_text())

    def walk(value, keys):
        yield keys
        for key in value if isinstance(value, dict) else ():
            yield from walk(value[key], [*keys, key])

    return manifest, [keys for keys in walk(manifest, []) if keys and keys[0] != "details"]


def altered(manifest, keys, value):
    """A manifest with another value in a place; none for an Ellipsis."""
    if not keys:
        return value
    changed = {**manifest, keys[0]: altered(manifest.get(keys[0]), keys[1:], value)}
    if changed[keys[0]] is ...:
        del changed[keys[0]]
    return changed


# What a model does not show: how it was initialized, what only training does, which is not tested here.
UNSEEN = {"init_std", "norm_type", "max_norm", "scale_grad_by_freq", "sparse", "padding_idx", "dropout"}


@pytest.mark.parametrize(
    "kind", ["hashed", *long("full", "clustered", "mixed-dimension", "transform", "product")]
)
@pytest.mark.parametrize("step", [6, *long(1)])
def test_a_manifest_that_lies_is_refused_or_tells_the_same(tmp_path, record_property, kind, step):
    """Its sums are right: whoever wrote it meant it."""
    model = trained(kind, "shared")
    cemb.save(tmp_path / "model", model, WORDS, details={})
    manifest, places = told(tmp_path / "model")
    lies = [
        ...,
        *LIES,
        2**40,
        2**62,
        10**400,
        float("nan"),
        "FullEmbedding",
        "Tensor",
        "os.system",
        "separate",
    ]
    refused = tried = 0
    for place, keys in enumerate(places):
        for lie in lies[place % step :: step]:
            (tmp_path / "model" / "manifest.json").write_text(json.dumps(altered(manifest, keys, lie)))
            sum_again(tmp_path / "model")
            tried += 1
            try:
                found = cemb.load(tmp_path / "model")
            except ValueError as error:
                refused += 1
                assert str(tmp_path / "model") in str(error), (keys, lie)
                continue
            state = found.model.state_dict()
            assert found.words == WORDS
            assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
            if keys[-1] not in UNSEEN | {"hash_seed", "temperature", "base_dim"}:
                check_same_pairs(found.model.train(), model.train())
    assert refused > 0.7 * tried
    record_property("manifests that lie", tried)


@pytest.mark.parametrize("kind", [*TABLES, *COMPRESSED_TABLES, *QUANTIZED])
def test_arguments_that_a_table_does_not_have_are_refused(tmp_path, kind):
    """Among them those that its class takes: such as a device, whose memory would be taken."""
    table = trained(kind).word_table
    words = [str(row) for row in range(table.num_embeddings)]
    cemb.save(tmp_path / "model", table, words, details={})
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    names = {"device", "dtype", "weight", "_weight", "_freeze", "hash_seed", "compression_ratio", "other"}
    for name in sorted(names - {*table.arguments}):
        for lie in (None, 1, "cpu"):
            lying = altered(manifest, ["model", "arguments", name], lie)
            (tmp_path / "model" / "manifest.json").write_text(json.dumps(lying))
            sum_again(tmp_path / "model")
            with pytest.raises(files.DamagedError):
                cemb.load(tmp_path / "model")
    lying = altered(manifest, ["model", "arguments", "device"], "cpu")
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(lying))
    sum_again(tmp_path / "model")
    with pytest.raises(files.DamagedError, match=r"has the arguments \[.*\], got \[.*'device'"):
        cemb.load(tmp_path / "model")


HUGE = {
    "full": {"num_embeddings": 2**40},
    "hashed": {"pool_size": 2**32 - 1, "num_embeddings": 2**40},
    "hashed-reference": {"embedding_dim": 2**24},
    "low-rank": {"rank": 2**40},
    "clustered": {"num_embeddings": 2**39, "num_clusters": 2**31},
    "product": {"num_embeddings": 2**40, "embedding_dim": 2**20, "num_groups": 2**20},
    "transform": {"num_code_bytes": 2**50, "embedding_dim": 2**20},
}


@pytest.mark.parametrize("kind", HUGE)
def test_sizes_that_are_claimed_take_no_memory(tmp_path, kind):
    cemb.save(tmp_path / "model", trained(kind, "separate"), WORDS, details={})
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    manifest["num_words"] = HUGE[kind].get("num_embeddings", NUM_WORDS)
    for table in ("word_table", "context_table"):
        manifest["model"][table]["arguments"] |= HUGE[kind]
    for num_words in (NUM_WORDS, 2**40):
        manifest["num_words"] = num_words
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
        sum_again(tmp_path / "model")
        tracemalloc.start()
        try:
            with pytest.raises(files.DamagedError, match="model' is damaged: ") as error:
                cemb.load(tmp_path / "model")
            assert "allocate" not in str(error.value)
            assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda at: (at / "words.json").write_text(json.dumps(WORDS[1:])),
            "got 289, of which 289 are distinct",
        ),
        (
            lambda at: (at / "words.json").write_text(json.dumps([*WORDS[1:], "other"])),
            "words_sha256 of manifest",
        ),
        (
            lambda at: (at / "words.json").write_text(json.dumps([WORDS[1], *WORDS[1:]])),
            "of which 289 are dis",
        ),
        (lambda at: (at / "words.json").write_text(json.dumps([*WORDS[1:], 3])), "words must be texts"),
        (lambda at: (at / "words.json").write_text("{}"), "words.json is no array"),
        (lambda at: (at / "words.json").write_text("["), "words.json is not JSON"),
        (lambda at: (at / "words.json").unlink(), "words.json"),
        (lambda at: (at / "model.safetensors").unlink(), "model.safetensors"),
        (lambda at: (at / "model.safetensors").write_bytes(b""), "header"),
        (lambda at: (at / "model.safetensors").write_bytes(b"\xff" * 99), "header"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, change, what):
    cemb.save(tmp_path / "model", trained("hashed"), WORDS, details={})
    change(tmp_path / "model")
    sum_again(tmp_path / "model")
    with pytest.raises(files.DamagedError, match=what):
        cemb.load(tmp_path / "model")


def test_what_a_manifest_lacks_is_named(tmp_path):
    cemb.save(tmp_path / "model", FullEmbedding(3, 2), "abc", details={})
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    del manifest["model"]["arguments"]["embedding_dim"]
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    sum_again(tmp_path / "model")
    with pytest.raises(
        files.DamagedError, match=r"is damaged: manifest\.json has no 'embedding_dim'; train or"
    ):
        cemb.load(tmp_path / "model")


def test_another_kind_or_version_is_refused(tmp_path):
    cemb.save(tmp_path / "model", FullEmbedding(3, 2), "abc", details={})
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    for change, what in (
        ({"version": 2}, "has version 2, and this reads version 1"),
        ({"kind": "counts"}, "is a counts of hash version 1, and this reads a model of hash version 1"),
        ({"hash_version": 2}, "is a model of hash version 2, and this reads"),
    ):
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest | change))
        sum_again(tmp_path / "model")
        with pytest.raises(ValueError, match=what):
            cemb.load(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"none' has no manifest\.json"):
        cemb.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("kind", "name", "value", "what"),
    [
        ("transform", "word_table.bits", 9, "word_table.codes are [0-9]+ bytes, and word_table.bits tell of"),
        (
            "transform",
            "context_table.bits",
            0,
            "context_table.codes are [0-9]+ bytes, and context_table.bits tell",
        ),
        (
            "clustered",
            "word_table.codes",
            127,
            "word_table.codes are of other clusters than the [0-9]+ there",
        ),
    ],
)
def test_values_that_do_not_belong_together_are_refused(tmp_path, kind, name, value, what):
    cemb.save(tmp_path / "model", trained(kind), WORDS, details={})
    path = tmp_path / "model" / "model.safetensors"
    values = load_file(path)
    values[name].view(-1)[0] = value
    path.unlink()
    save_file(values, path)
    sum_again(tmp_path / "model")
    with pytest.raises(files.DamagedError, match=what) as error:
        cemb.load(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_values_of_another_shape_or_type_are_refused(tmp_path):
    cemb.save(tmp_path / "model", QUANTIZED["int8"](), WORDS, details={})
    path = tmp_path / "model" / "model.safetensors"
    values = load_file(path)
    for change, what in (
        ({"codes": values["codes"][:-1].clone()}, r"codes of model.safetensors has shape \[289, 12\], and"),
        ({"codes": values["codes"].to(torch.uint8)}, "codes of model.safetensors is torch.uint8, and should"),
        (
            {"other": torch.zeros(2)},
            r"has \['codes', 'other', 'scales'\], and should have \['codes', 'scales'\]",
        ),
    ):
        path.unlink()
        save_file(values | change, path)
        sum_again(tmp_path / "model")
        with pytest.raises(files.DamagedError, match=what):
            cemb.load(tmp_path / "model")
