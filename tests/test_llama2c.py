"""Models of llama2.c: files packed here by the layout's definition, computed here as run.c does."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import error_line, run_midspan
from transformers import AutoModelForCausalLM

from common.errors import CheckpointError, SettingsError
from common.formats.llama2c_conversion import export_llama2c, import_llama2c
from common.formats.part_folder import write_parts
from common.formats.tokenizer_bin import read_tokenizer, write_tokenizer
from common.spans.parts import read_parts
from common.weights.checkpoint import Checkpoint
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.tokenizer import TextStream, TextTokenizer

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
GROUP = 16


@dataclass(frozen=True)
class Shape:
    """A model of llama2.c, by the names of its own Config."""

    dim: int = 32
    hidden_dim: int = 48
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 300
    seq_len: int = 64
    shared: bool = True

    @property
    def numbers(self) -> tuple[int, ...]:
        return (
            self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads,
            self.vocab_size, self.seq_len,
        )  # fmt: skip


SHAPES = {
    "tied": Shape(),
    "own-classifier": Shape(shared=False),
    "all-heads-have-keys": Shape(n_kv_heads=4),
}


def draw_weights(shape: Shape) -> dict[str, list[Array]]:
    """By llama2.c's names, each kind over all layers."""
    rng = np.random.default_rng(7)
    kv_dim = shape.dim * shape.n_kv_heads // shape.n_heads

    def draw(*size: int, count: int = shape.n_layers, mean: float = 0.0) -> list[Array]:
        return [(mean + rng.normal(0, 0.3, size)).astype(np.float32) for _ in range(count)]

    weights = {
        "tok": draw(shape.vocab_size, shape.dim, count=1),
        "att_norm": draw(shape.dim, mean=1), "ffn_norm": draw(shape.dim, mean=1),
        "norm": draw(shape.dim, count=1, mean=1),
        "wq": draw(shape.dim, shape.dim), "wk": draw(kv_dim, shape.dim),
        "wv": draw(kv_dim, shape.dim), "wo": draw(shape.dim, shape.dim),
        "w1": draw(shape.hidden_dim, shape.dim), "w2": draw(shape.dim, shape.hidden_dim),
        "w3": draw(shape.hidden_dim, shape.dim),
    }  # fmt: skip
    own = draw(shape.vocab_size, shape.dim, count=1)
    return weights | {"wcls": weights["tok"] if shape.shared else own}


LATER_ORDER = ["tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def pack_v0(shape: Shape, weights: dict[str, list[Array]]) -> bytes:
    numbers = list(shape.numbers)
    if not shape.shared:
        numbers[5] = -numbers[5]
    data = struct.pack("<iiiiiii", *numbers)
    order = ["tok", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm"]
    for name in order:
        data += b"".join(w.tobytes() for w in weights[name])
    data += b"\x7f" * (
        4 * shape.seq_len * (shape.dim // shape.n_heads)
    )  # both tables, not looked at
    return data if shape.shared else data + weights["wcls"][0].tobytes()


def pack_header(version: int, shape: Shape, flags: bytes) -> bytes:
    data = struct.pack("<Ii", 0x616B3432, version) + struct.pack("<iiiiiii", *shape.numbers)
    data += struct.pack("<B", shape.shared) + flags
    return data + b"\0" * (256 - len(data))


def pack_v1(shape: Shape, weights: dict[str, list[Array]]) -> bytes:
    data = pack_header(1, shape, b"")
    names = ["att_norm", "ffn_norm", "norm", *LATER_ORDER] + ["wcls"] * (not shape.shared)
    return data + b"".join(w.tobytes() for name in names for w in weights[name])


def quantize(weight: Array) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int8]], Array]:
    groups = weight.reshape(-1, GROUP)
    scales = (np.abs(groups).max(axis=1) / 127).astype(np.float32)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def pack_v2(shape: Shape, weights: dict[str, list[Array]]) -> bytes:
    data = pack_header(2, shape, struct.pack("<i", GROUP))
    for name in ("att_norm", "ffn_norm", "norm"):
        data += b"".join(w.tobytes() for w in weights[name])
    for name in LATER_ORDER + ["wcls"] * (not shape.shared):
        for weight in weights[name]:
            codes, scales = quantize(weight)
            data += codes.tobytes() + scales.tobytes()
    return data


PACKERS = {0: pack_v0, 1: pack_v1, 2: pack_v2}


def round_weights(version: int, weights: dict[str, list[Array]]) -> dict[str, list[Array]]:
    """What is left of them in a file of that version."""
    if version < 2:
        return weights

    def there_and_back(weight: Array) -> Array:
        codes, scales = quantize(weight)
        return (codes.astype(np.float32) * scales[:, None]).reshape(weight.shape)

    return {
        name: [there_and_back(w) if w.ndim == 2 else w for w in kind]
        for name, kind in weights.items()
    }


def run_c(shape: Shape, weights: dict[str, list[Array]], tokens: list[int]) -> Array:
    """Logits after the last token, as run.c's forward computes them, one position at a time."""
    head, share = shape.dim // shape.n_heads, shape.n_heads // shape.n_kv_heads
    keys: list[list[Array]] = [[] for _ in range(shape.n_layers)]
    values: list[list[Array]] = [[] for _ in range(shape.n_layers)]

    def norm(x: Array, weight: Array) -> Array:
        return weight * (x / np.sqrt((x * x).mean() + 1e-5))

    def rotate(x: Array, pos: int) -> Array:
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = pos / 10000.0 ** ((i % head) / head)
            a, b = x[i], x[i + 1]
            x[i], x[i + 1] = (
                a * np.cos(angle) - b * np.sin(angle),
                a * np.sin(angle) + b * np.cos(angle),
            )
        return x

    for pos, token in enumerate(tokens):
        x = weights["tok"][0][token].astype(np.float64)
        for at in range(shape.n_layers):
            y = norm(x, weights["att_norm"][at])
            q = rotate(weights["wq"][at] @ y, pos)
            keys[at].append(rotate(weights["wk"][at] @ y, pos))
            values[at].append(weights["wv"][at] @ y)
            out = np.zeros(shape.dim)
            for h in range(shape.n_heads):
                own = slice(h * head, (h + 1) * head)
                theirs = slice(h // share * head, (h // share + 1) * head)
                scores = np.array([q[own] @ k[theirs] for k in keys[at]]) / np.sqrt(head)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                out[own] = sum(s * v[theirs] for s, v in zip(shares, values[at], strict=True))
            x = x + weights["wo"][at] @ out
            y = norm(x, weights["ffn_norm"][at])
            gate = weights["w1"][at] @ y
            x = x + weights["w2"][at] @ (gate / (1 + np.exp(-gate)) * (weights["w3"][at] @ y))
    return weights["wcls"][0] @ norm(x, weights["norm"][0])


ALPHABET = [bytes([byte]) for byte in range(32, 127)] + ["é".encode(), "…".encode(), b"\n"]


def make_vocabulary(size: int, seed: int = 1) -> list[tuple[bytes, float]]:
    """Marks, bytes, characters, then strings of what is there; many scores are equal."""
    rng = random.Random(seed)
    vocabulary = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    vocabulary += [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]
    vocabulary += [(letter, 0.0) for letter in [b" ", b"a", b"b", *ALPHABET][: size // 4]]
    known = {piece for piece, _ in vocabulary}
    while len(vocabulary) < size:
        parts = [piece for piece, _ in vocabulary[259:]]
        few = rng.choice([parts[:3], parts])  # a, b and spaces mostly: the same again and again
        piece = rng.choice(few) + rng.choice(parts[:3] if rng.random() < 0.7 else parts)
        if piece not in known and len(piece) < 24:
            known.add(piece)
            vocabulary.append((piece, -float(rng.randrange(6))))
    return vocabulary


def pack_tokenizer(vocabulary: list[tuple[bytes, float]]) -> bytes:
    data = struct.pack("<i", max(len(piece) for piece, _ in vocabulary))
    for piece, score in vocabulary:
        data += struct.pack("<fi", score, len(piece)) + piece
    return data


def encode_c(vocabulary: list[tuple[bytes, float]], text: str) -> list[int]:
    """As run.c's encode does it, byte by byte and pair by pair."""
    pieces, scores = [piece for piece, _ in vocabulary], [score for _, score in vocabulary]
    tokens = [1]
    if text:
        tokens.append(pieces.index(b" "))
    data, buffer = text.encode(), b""
    for at, byte in enumerate(data):
        if byte & 0xC0 != 0x80:
            buffer = b""
        buffer += bytes([byte])
        if at + 1 < len(data) and data[at + 1] & 0xC0 == 0x80 and len(buffer) < 4:
            continue
        tokens += [pieces.index(buffer)] if buffer in pieces else [b + 3 for b in buffer]
        buffer = b""
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for at in range(len(tokens) - 1):
            both = pieces[tokens[at]] + pieces[tokens[at + 1]]
            if both in pieces and scores[pieces.index(both)] > best_score:
                best_id, best_at = pieces.index(both), at
                best_score = scores[best_id]
        if best_at == -1:
            return tokens
        tokens[best_at : best_at + 2] = [best_id]


def draw_text(rng: random.Random) -> str:
    letters = [
        "a",
        "b",
        " ",
        "aa",
        "ab",
        "   ",
        "é",
        "…",
        "\n",
        "\t",
        "fox",
        "🦊",
        "日",
        "\x7f",
        "<0x41>",
    ]
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, 40)))


@pytest.fixture(scope="module")
def vocabulary() -> list[tuple[bytes, float]]:
    return make_vocabulary(420)


@pytest.fixture(scope="module")
def tokenizer_file(
    vocabulary: list[tuple[bytes, float]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.bin"
    path.write_bytes(pack_tokenizer(vocabulary))
    return path


def pack_model(directory: Path, version: int, shape: Shape) -> Path:
    path = directory / f"v{version}.bin"
    path.write_bytes(PACKERS[version](shape, draw_weights(shape)))
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_converted_model_computes_what_llama2c_does(
    version: int, shape: Shape, tokenizer_file: Path, tmp_path: Path
) -> None:
    import_llama2c(pack_model(tmp_path, version, shape), tokenizer_file, tmp_path / "model")
    tokens = [1, 299, 17, 4, 250, 99, 99, 3]
    want = run_c(shape, round_weights(version, draw_weights(shape)), tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(torch.tensor([tokens])).logits[0, -1].numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()  # float32 beside float64
    assert model.config.max_position_embeddings == shape.seq_len


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("version", [0, 1])
def test_a_model_goes_back_to_the_bytes_that_it_came_from(
    version: int, shape: Shape, tokenizer_file: Path, tmp_path: Path
) -> None:
    file = pack_model(tmp_path, version, shape)
    import_llama2c(file, tokenizer_file, tmp_path / "model")
    export_llama2c(Checkpoint(tmp_path / "model"), tmp_path / "back.bin", version)
    want, got = file.read_bytes(), (tmp_path / "back.bin").read_bytes()
    if version == 0:  # the tables of angles are the only bytes that were not a model's
        head = shape.dim // shape.n_heads
        end = len(want) - (0 if shape.shared else 4 * shape.vocab_size * shape.dim)
        start = end - 4 * shape.seq_len * head
        tables = np.frombuffer(got[start:end], np.float32).reshape(2, shape.seq_len, head // 2)
        angles = np.outer(np.arange(shape.seq_len), 10000.0 ** -(np.arange(0, head, 2) / head))
        assert np.abs(tables - np.stack([np.cos(angles), np.sin(angles)])).max() < 1e-5
        want, got = want[:start] + want[end:], got[:start] + got[end:]
    assert got == want


def test_a_model_in_int8_is_what_the_layout_says(tokenizer_file: Path, tmp_path: Path) -> None:
    """Groups of 16, for 48 is no multiple of 32; values of a group reach 127, so they come back."""
    shape = Shape(shared=False)
    file = pack_model(tmp_path, 2, shape)
    import_llama2c(file, tokenizer_file, tmp_path / "model")
    export_llama2c(Checkpoint(tmp_path / "model"), tmp_path / "back.bin", 2)
    got, want = (tmp_path / "back.bin").read_bytes(), file.read_bytes()
    assert (len(got), got[:256]) == (len(want), want[:256])
    import_llama2c(tmp_path / "back.bin", tokenizer_file, tmp_path / "again")
    one, other = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "again")
    for name in one.tensor_names:  # a scale, divided by 127 and back, may move in its last bit
        assert torch.allclose(one.read_stored(name), other.read_stored(name), rtol=1e-6, atol=0)


def test_zeros_are_quantized_to_zeros(tokenizer_file: Path, tmp_path: Path) -> None:
    shape = Shape()
    weights = draw_weights(shape)
    weights["wo"][1][:] = 0
    (tmp_path / "v1.bin").write_bytes(pack_v1(shape, weights))
    import_llama2c(tmp_path / "v1.bin", tokenizer_file, tmp_path / "model")
    export_llama2c(Checkpoint(tmp_path / "model"), tmp_path / "v2.bin", 2)
    import_llama2c(tmp_path / "v2.bin", tokenizer_file, tmp_path / "again")
    tensor = Checkpoint(tmp_path / "again").read_stored("model.layers.1.self_attn.o_proj.weight")
    assert not tensor.any()


@pytest.mark.parametrize("seed", range(4))
def test_a_text_has_the_ids_that_llama2c_gives_it(seed: int, tmp_path: Path) -> None:
    vocabulary = make_vocabulary(420, seed)
    (tmp_path / "tok.bin").write_bytes(pack_tokenizer(vocabulary))
    tokens, rng = read_tokenizer(tmp_path / "tok.bin"), random.Random(seed)
    for text in ["", " ", "a", *(draw_text(rng) for _ in range(150))]:
        assert tokens.encode(text) == encode_c(vocabulary, text), repr(text)
        assert tokens.encode(text, begins=False) == encode_c(vocabulary, text)[1:]


def test_tokens_are_texts_again(tokenizer_file: Path) -> None:
    tokens, rng = read_tokenizer(tokenizer_file), random.Random(3)
    for _ in range(100):
        text = draw_text(rng).replace("<0x41>", "")  # which run.c, too, would print as A
        assert tokens.decode(tokens.encode(text)) == text.encode()


def test_a_text_comes_piece_by_piece_as_it_is_whole(tokenizer_file: Path, tmp_path: Path) -> None:
    import_llama2c(pack_model(tmp_path, 0, Shape()), tokenizer_file, tmp_path / "model")
    tokenizer = TextTokenizer(tmp_path / "model")
    prompt, rest = tokenizer.encode("a fox"), tokenizer.encode("b 🦊é…  \n ab")[1:]
    stream = TextStream(tokenizer, prompt)
    pieces = "".join(stream.add(token) for token in rest)
    assert pieces == tokenizer.decode([*prompt, *rest])[len("a fox") :]
    assert b"".join(tokenizer.token_bytes(token) for token in rest).decode() == pieces
    assert tokenizer.end_ids == [2]
    assert not tokenizer.has_chat_template
    chat = [{"role": "user", "content": "ab"}]
    template = "{{ messages[0].content }}{{ 'a' if add_generation_prompt }}"
    assert tokenizer.render_chat(chat, template) == tokenizer.tokenize("aba", False)
    marked = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ bos_token }}a"
    ids = tokenizer.render_chat([{"role": "user", "content": "<s>"}], marked)
    assert ids == [*tokenizer.tokenize("<s>"), 2, *tokenizer.tokenize("a")]


def test_a_file_that_could_not_be_written_whole_is_not_there(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_llama2c(pack_model(tmp_path, 0, Shape()), tokenizer_file, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    (tmp_path / "back.bin").write_text("of before")

    def fail(name: str) -> torch.Tensor:
        raise OSError(errno.EIO, "as of a broken disk")

    monkeypatch.setattr(checkpoint, "read_stored", fail)
    with pytest.raises(OSError, match="broken disk"):
        export_llama2c(checkpoint, tmp_path / "back.bin", 0)
    assert [path.read_text() for path in tmp_path.glob("back*")] == ["of before"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:20], "too short"),
        (lambda data: data[:-4], "its header.* makes it"),
        (lambda data: data + b"\0", "its header.* makes it"),
        (lambda data: struct.pack("<i", -5) + data[4:], "gives dim as -5"),
        (lambda data: data[:12] + struct.pack("<i", 5) + data[16:], "do not make 5 heads"),
        (lambda data: struct.pack("<Ii", 0x616B3432, 3) + data[8:], "version 3; known are"),
        (lambda data: b"GGUF" + data[4:], "gives dim as 1179993927"),
    ],
)
def test_a_file_that_is_no_model_of_llama2c_is_refused(
    change: object, words: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    file = pack_model(tmp_path, 0, Shape())
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        import_llama2c(file, tokenizer_file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:3], "too short"),
        (lambda data: data[:-1], "token 419 is broken"),
        (lambda data: data[:8] + struct.pack("<i", -1) + data[12:], "token 0 is broken"),
        (lambda data: data[:500], "token .* is broken|has .* tokens"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(
    change: object, words: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tok.bin").write_bytes(change(tokenizer_file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        read_tokenizer(tmp_path / "tok.bin")


def test_a_tokenizer_of_fewer_tokens_than_the_model_is_refused(
    vocabulary: list[tuple[bytes, float]], tmp_path: Path
) -> None:
    (tmp_path / "tok.bin").write_bytes(pack_tokenizer(vocabulary[:299]))
    with pytest.raises(CheckpointError, match=r"has 299 tokens; .* needs 300"):
        import_llama2c(pack_model(tmp_path, 0, Shape()), tmp_path / "tok.bin", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and llama2.c computes with 1e-05"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 500000"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ],
)
def test_a_model_that_llama2c_would_compute_otherwise_is_refused(
    change: dict[str, object], words: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    import_llama2c(pack_model(tmp_path, 0, Shape()), tokenizer_file, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(SettingsError, match=words):
        export_llama2c(Checkpoint(tmp_path / "model"), tmp_path / "x.bin", 0)


def test_a_tokenizer_goes_back_to_its_bytes(tokenizer_file: Path, tmp_path: Path) -> None:
    write_tokenizer(read_tokenizer(tokenizer_file), tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == tokenizer_file.read_bytes()


def test_tokens_beyond_the_models_are_not_used(
    vocabulary: list[tuple[bytes, float]], tokenizer_file: Path, tmp_path: Path
) -> None:
    """run.c reads as many as the model has."""
    import_llama2c(pack_model(tmp_path, 0, Shape()), tokenizer_file, tmp_path / "model")
    tokenizer, rng = TextTokenizer(tmp_path / "model"), random.Random(9)
    for text in (draw_text(rng) for _ in range(20)):
        assert tokenizer.tokenize(text) == encode_c(vocabulary[:300], text)


def test_the_pool_writes_the_tokens_of_llama2c(
    tokenizer_file: Path, tmp_path: Path, vocabulary: list[tuple[bytes, float]]
) -> None:
    """From its file over the command to an answer; then back to files."""
    shape = Shape(vocab_size=len(vocabulary))
    file = pack_model(tmp_path, 1, shape)
    done = run_midspan(
        "model", "convert", str(file), "--tokenizer", str(tokenizer_file),
        "-o", str(tmp_path / "model"),
    )  # fmt: skip
    assert "holds b 0-4 e of model" in done.stdout, done.stderr
    with LocalPool(PoolSettings(workers=1, model=str(tmp_path / "model"))) as pool:
        options = ["--broker", pool.edge_endpoint, "--json", "-n", "6", "-t", "0", "--no-serve"]
        options += ["--codec", "fp32", "--model", str(tmp_path / "model")]
        asked = run_midspan("ask", "a fox", *options)
    assert asked.returncode == 0, asked.stderr
    tokens = encode_c(vocabulary, "a fox")
    want: list[int] = []
    for _ in range(6):
        want.append(int(run_c(shape, draw_weights(shape), tokens + want).argmax()))
        if want[-1] in (1, 2):
            break
    assert json.loads(asked.stdout)["token_ids"] == want
    back, tokenizer = tmp_path / "back.bin", tmp_path / "tok-back.bin"
    done = run_midspan(
        "model", "convert", str(tmp_path / "model"), "--to", "llama2c", "--version", "1",
        "--tokenizer", str(tokenizer), "-o", str(back),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert back.read_bytes() == file.read_bytes()
    assert tokenizer.read_bytes() == tokenizer_file.read_bytes()


def test_a_device_gets_the_tokenizer_with_its_part(tokenizer_file: Path, tmp_path: Path) -> None:
    import_llama2c(pack_model(tmp_path, 0, Shape()), tokenizer_file, tmp_path / "model")
    model = Checkpoint(tmp_path / "model")
    write_parts(model, read_parts("b 0-1 3-4 e", 4), tmp_path / "device")
    write_parts(model, read_parts("1-3", 4), tmp_path / "worker")
    assert TextTokenizer(tmp_path / "device").decode([1, 260]) == "a"
    assert not (tmp_path / "worker" / "tokenizer.bin").exists()


def test_what_convert_lacks_is_named(tmp_path: Path) -> None:
    file = pack_model(tmp_path, 0, Shape())
    line = error_line("model", "convert", str(file), "-o", str(tmp_path / "x"))
    assert "needs the --tokenizer that it was trained with" in line
    line = error_line("model", "convert", "nothing.bin", "-o", str(tmp_path / "x"))
    assert "nothing.bin is no file" in line
    line = error_line(
        "model", "convert", "stories-llama", "--to", "llama2c", "-o", str(tmp_path / "x.bin")
    )
    assert "rms_norm_eps is 1e-06" in line


def test_a_converted_file_replaces_no_pipe_and_no_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ("model", "convert", "stories-llama", "--to", "llama2c")
    for target in (str(pipe), "/dev/full"):
        assert error_line(*words, "-o", target) == f"Error: {target} is no plain file"
    both = (*words, "-o", str(tmp_path / "a"), "--tokenizer", str(tmp_path / "a"))
    assert "are both" in error_line(*both)
