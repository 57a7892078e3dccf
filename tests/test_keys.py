"""CURVE keys, sealing, and the KV at rest: without a pool."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner
from zmq.utils import z85

from cloud_worker.state.row_seals import Checksum, ForgedRows, KvCipher, RowSeal, unseal
from common.errors import ProtocolError, SettingsError
from common.security.keys import (
    KeyPair,
    authorize,
    create_key,
    is_public,
    list_authorized,
    load_client_keys,
    read_pair,
    read_public,
)
from common.security.sealing import draw_key, open_sealed, seal
from deploy.cli import midspan

FIELD = 2**255 - 19
LOW_ORDER_POINTS = (  # all of Curve25519: https://cr.yp.to/ecdh.html#validate
    0, 1, FIELD - 1, FIELD, FIELD + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)  # fmt: skip


def new_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def test_a_secret_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = create_key(tmp_path, "phone")
    assert stat.S_IMODE(os.stat(path.with_suffix(".key_secret")).st_mode) == 0o600
    assert read_pair(path).public == read_public(str(path))


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_key(tmp_path, "phone")
    with pytest.raises(SettingsError, match=r"phone\.key is there already"):
        create_key(tmp_path, "phone")


def test_a_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a key's name is '\.\./x'"):
        authorize(tmp_path, new_pair().public, "edge", "../x")


def test_authorized_keys_are_listed_by_role(tmp_path: Path) -> None:
    phone, worker = new_pair().public, new_pair().public
    authorize(tmp_path, phone, "edge", "phone")
    authorize(tmp_path, worker, "worker", "w1")
    assert list_authorized(tmp_path, "edge") == {phone: "phone"}
    assert list_authorized(tmp_path, "worker") == {worker: "w1"}
    with pytest.raises(SettingsError, match="another edge is authorized as 'phone'"):
        authorize(tmp_path, worker, "edge", "phone")


@pytest.mark.parametrize("text", ["not there", "", "[" * 39, 'curve\n    public-key = "short"\n'])
def test_what_is_no_key_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.key"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"bad\.key"):
        read_public(str(path))


def test_key_and_broker_key_go_together(tmp_path: Path) -> None:
    assert load_client_keys(None, None) is None
    with pytest.raises(SettingsError, match="go together"):
        load_client_keys(create_key(tmp_path, "phone"), None)


@pytest.mark.parametrize(
    ("endpoint", "public"),
    [
        ("tcp://127.0.0.1:5555", False), ("tcp://localhost:1", False), ("ipc:///tmp/x", False),
        ("tcp://[::1]:5555", False), ("tcp://0.0.0.0:5555", True), ("tcp://*:5555", True),
        ("tcp://192.168.1.4:5555", True), ("tcp://eth0:5555", True), ("tcp://[::]:5555", True),
    ],
)  # fmt: skip
def test_which_addresses_others_reach(endpoint: str, public: bool) -> None:
    assert is_public(endpoint) is public


@pytest.mark.parametrize("option", ["--edge-endpoint", "--worker-endpoint"])
def test_a_broker_does_not_bind_a_public_address_without_keys(option: str) -> None:
    result = CliRunner().invoke(midspan, ["broker", option, "tcp://0.0.0.0:*"])
    assert result.exit_code == 1
    assert f"{option} tcp://0.0.0.0:* can be reached from other machines" in result.output


def test_the_keys_commands(tmp_path: Path) -> None:
    runner, where = CliRunner(), ["--keys", str(tmp_path)]
    assert runner.invoke(midspan, ["keys", "new", "phone", *where]).exit_code == 0
    public = str(tmp_path / "phone.key")
    assert (
        runner.invoke(midspan, ["keys", "authorize", public, "--as", "edge", *where]).exit_code == 0
    )
    listed = runner.invoke(midspan, ["keys", "list", *where]).output
    assert listed.count(read_public(public).decode()) == 2
    assert "admitted as edge" in listed
    bad = runner.invoke(midspan, ["keys", "authorize", "nonsense", "--as", "edge", *where])
    assert bad.exit_code == 1
    assert "the key nonsense does not exist" in bad.output


def test_a_key_to_authorize_is_looked_for_where_the_keys_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, here = tmp_path / "keys", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    create_key(keys, "phone")
    command = ["keys", "authorize", "phone.key", "--as", "edge", "--keys", str(keys)]
    assert CliRunner().invoke(midspan, command).exit_code == 0
    assert list_authorized(keys, "edge") == {read_public(str(keys / "phone.key")): "phone"}
    create_key(here, "phone")  # one at the path itself goes first
    taken = CliRunner().invoke(midspan, command)
    assert "another edge is authorized as 'phone'" in taken.output


def test_a_sealed_key_opens_with_the_pool_key_and_no_other() -> None:
    pool, key = new_pair(), draw_key()
    sealed = seal(key, pool.public)
    assert key not in sealed
    assert open_sealed(sealed, pool) == key
    for broken in (sealed[:-1], b"", b"x" * 80, seal(key, new_pair().public)):
        with pytest.raises(ProtocolError, match="does not open with this worker's --pool-key"):
            open_sealed(broken, pool)


def test_a_sealed_key_of_another_length_is_refused() -> None:
    pool = new_pair()
    with pytest.raises(ProtocolError, match="has 31 bytes; expected 32"):
        open_sealed(seal(bytes(31), pool.public), pool)


@pytest.mark.parametrize("sign", [0, 1 << 255])
@pytest.mark.parametrize("point", LOW_ORDER_POINTS)
def test_no_key_is_sealed_for_a_point_whose_secret_everyone_knows(point: int, sign: int) -> None:
    public = z85.encode((point | sign).to_bytes(32, "little"))
    with pytest.raises(SettingsError, match="is no public key of a pool"):
        seal(draw_key(), public)


@pytest.mark.parametrize("encrypted", [False, True])
def test_sealed_rows_come_back_only_where_they_belong(encrypted: bool) -> None:
    key = draw_key()

    def make(session: bytes) -> RowSeal:
        return KvCipher(key, session) if encrypted else Checksum(session)

    seal, rows = make(b"session"), secrets.token_bytes(5 * 64)
    stored, size = seal.seal(rows, 7, 64, 3), 64 + seal.overhead
    assert len(stored) == 5 * size
    assert unseal(seal, stored, 7, 64, 3) == rows
    assert unseal(seal, stored[size:], 8, 64, 3) == rows[64:]
    flipped = bytes([stored[0] ^ 1]) + stored[1:]
    zeros = bytes(len(stored))
    for wrong, start in ((stored, 8), (flipped, 7), (zeros, 7)):
        with pytest.raises(ForgedRows):
            unseal(seal, wrong, start, 64, 3)
    with pytest.raises(ForgedRows):
        unseal(make(b"another"), stored, 7, 64, 3)


@pytest.mark.parametrize("seal", [Checksum(b"session"), KvCipher(draw_key(), b"session")])
def test_rows_before_a_hole_are_kept(seal: RowSeal) -> None:
    rows = secrets.token_bytes(4 * 64)
    stored, size = seal.seal(rows, 0, 64, 0), 64 + seal.overhead
    with pytest.raises(ForgedRows, match="row 2 in the store") as caught:
        unseal(seal, stored[: 2 * size] + bytes(size) + stored[3 * size :], 0, 64, 0)
    assert caught.value.whole == rows[: 2 * 64]


def test_encrypted_rows_from_before_a_cut_back_are_refused() -> None:
    cipher = KvCipher(draw_key(), b"session")
    with pytest.raises(ForgedRows):
        unseal(cipher, cipher.seal(b"r" * 64, 5, 64, 0), 5, 64, 1)


def test_the_same_rows_are_never_encrypted_alike() -> None:
    cipher = KvCipher(draw_key(), b"session")
    assert cipher.seal(b"r" * 64, 0, 64, 0) != cipher.seal(b"r" * 64, 0, 64, 0)
