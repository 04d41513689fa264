"""The join code: typed badly it is refused, typed sloppily it is read, and it is never shown."""

from __future__ import annotations

import json
import re

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from hypothesis import given
from hypothesis import strategies as st

from coase.protocol.errors import ConfigurationError
from coase.protocol.joincode import ALPHABET, SYMBOLS, JoinCode
from coase.protocol.subjects import require_net
from tests.vectors.make import HERE

codes = st.binary(min_size=16, max_size=16).map(JoinCode.of)
places = st.integers(0, SYMBOLS - 1)
CODE = JoinCode.of(b"sixteen secrets!")


def bare(code: JoinCode) -> str:
    return code.text.replace("-", "")


def complaint(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        JoinCode.parse(text)
    return str(caught.value)


@given(codes)
def test_what_is_read_out_is_read_back(code: JoinCode) -> None:
    assert JoinCode.parse(code.text) == code
    assert re.fullmatch(rf"[{ALPHABET}]{{4}}(-[{ALPHABET}]{{4}}){{6}}", code.text)
    assert not set("ILOU") & set(code.text)


@given(codes, st.data())
def test_case_dashes_blanks_and_letters_that_look_alike_do_not_matter(
    code: JoinCode, data: st.DataObject
) -> None:
    alike = {"0": "0Oo", "1": "1IiLl"}
    typed = ""
    for letter in bare(code):
        typed += data.draw(st.sampled_from(alike.get(letter, letter + letter.lower())))
        typed += data.draw(
            st.sampled_from(["", "", "-", " ", "\t", "\n", "\u2013", "\u00a0", "\u200b"])
        )
    assert JoinCode.parse(f"  {typed}\r\n") == code


@given(codes, places, st.sampled_from(ALPHABET))
def test_every_single_wrong_character_is_noticed_and_located(
    code: JoinCode, place: int, wrong: str
) -> None:
    text = bare(code)
    typed = text[:place] + wrong + text[place + 1 :]
    if wrong == text[place]:
        assert JoinCode.parse(typed) == code
    else:
        assert f"number {place + 1} (group {place // 4 + 1}," in complaint(typed)


@given(codes, places, places)
def test_every_two_that_changed_places_are_noticed(code: JoinCode, one: int, other: int) -> None:
    letters = list(bare(code))
    letters[one], letters[other] = letters[other], letters[one]
    if "".join(letters) == bare(code):
        assert JoinCode.parse("".join(letters)) == code
    else:
        assert "typing error" in complaint("".join(letters))


@given(codes, places, places, st.sampled_from(ALPHABET), st.sampled_from(ALPHABET))
def test_every_two_wrong_characters_are_noticed(
    code: JoinCode, one: int, other: int, first: str, second: str
) -> None:
    letters = list(bare(code))
    letters[one], letters[other] = first, second
    if "".join(letters) != bare(code):
        assert "typing error" in complaint("".join(letters))


def test_of_other_accidents_few_pass() -> None:
    letters = bare(CODE)
    passed = 0
    for shift in range(1, 32):
        for start in range(SYMBOLS - 4):
            typed = list(letters)
            for place in range(start, start + 5):  # Five in a row, each off by the same.
                typed[place] = ALPHABET[(ALPHABET.index(typed[place]) + shift) % 32]
            try:
                JoinCode.parse("".join(typed))
                passed += 1
            except ConfigurationError:
                pass
    assert passed <= 4  # Of 744; one in 1,024 is to be expected.


def test_the_two_bits_that_are_no_part_of_it_must_be_zero() -> None:
    # The last character of the code is off by 1, and both check symbols are made to fit.
    wrong = [
        text
        for first in ALPHABET
        for second in ALPHABET
        for last in ALPHABET
        if (text := bare(CODE)[:25] + last + first + second) != bare(CODE)
        and "character 26" in complaint_or_nothing(text)
    ]
    assert len(wrong) == 24  # 32 values of the symbol, 8 of which leave both bits alone.


def complaint_or_nothing(text: str) -> str:
    try:
        JoinCode.parse(text)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("typed", ["", "-", "0", bare(CODE)[:-1], bare(CODE) + "0", bare(CODE) * 2])
def test_a_wrong_length_is_said_with_its_number(typed: str) -> None:
    assert f"28 letters and digits and this has {len(typed.strip('-'))}" in complaint(typed)


def test_a_pasted_novel_is_refused_unread() -> None:
    assert "has 5600 characters" in complaint(bare(CODE) * 200)


@pytest.mark.parametrize("wrong", ["U", "u", "ß", "é", "!", "/", "٣", "\0"])
def test_a_character_that_none_has_is_said_with_its_place(wrong: str) -> None:
    text = CODE.text
    assert "character 6 " in complaint(text[:6] + wrong + text[7:])


@pytest.mark.parametrize("place", range(0, SYMBOLS, 3))
def test_no_error_repeats_what_was_typed(place: int) -> None:
    text = bare(CODE)
    for wrong in ("U", "%", "Z" if text[place] != "Z" else "Y", ""):
        said = complaint(text[:place] + wrong + text[place + 1 :])
        typed = (text[:place] + wrong + text[place + 1 :]).lower()
        assert not any(typed[at : at + 4] in said.lower() for at in range(len(typed) - 3))


def test_it_is_not_shown_by_accident() -> None:
    for shown in (repr(CODE), str(CODE), f"{CODE}", repr([CODE]), repr({"code": CODE})):
        assert CODE.net in shown
        assert CODE.text not in shown
        assert CODE.secret_bytes.hex() not in shown
        assert "sixteen" not in shown


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_it_is_made_of_sixteen_bytes(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"16 random bytes, not of {size}"):
        JoinCode.of(bytes(size))


@given(codes, codes)
def test_networks_of_other_codes_have_other_names_and_keys(one: JoinCode, other: JoinCode) -> None:
    require_net(one.net)
    same = one == other
    assert (one.net == other.net) is same
    assert (one.network_tag == other.network_tag) is same
    assert (one.ca_seed == other.ca_seed) is same


def test_each_purpose_has_a_secret_of_its_own() -> None:
    secrets = [CODE.secret(purpose) for purpose in ("ca", "chain", "", "CA", "ca ")]
    assert len(set(secrets)) == 5
    assert {len(secret) for secret in secrets} == {32}
    assert CODE.ca_seed == CODE.secret("ca")


def test_the_vector_is_what_others_compute() -> None:
    vector = json.loads((HERE / "lan.json").read_text(encoding="utf-8"))
    secret = bytes.fromhex(vector["secret"][2:])

    def keyed(key: bytes, message: bytes) -> bytes:
        mac = hmac.HMAC(key, hashes.SHA256())
        mac.update(message)
        return mac.finalize()

    assert vector["network_tag"] == keyed(secret, b"coase-net")[:16].hex()
    assert vector["net"] == "lan-" + vector["network_tag"][:12]
    # RFC 5869, one block: extract with the salt, expand with the info and a counter.
    extracted = keyed(b"coase/lan/v1", secret)
    for purpose, derived in vector["derived"].items():
        assert derived == "0x" + keyed(extracted, purpose.encode() + b"\x01").hex()
    assert vector["ca_seed"] == vector["derived"]["ca"]
    for text in (vector["text"], *vector["also_read"]):
        assert JoinCode.parse(text).secret_bytes == secret
