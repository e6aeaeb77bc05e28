"""Content codings: what a client accepts, what is worth compressing, what a frame may do to us, and
which headers say so."""

import gzip as standard_gzip
import itertools
import random
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.core import encoding
from respcache.core.encoding import (
    ContentCoding,
    accepted,
    compress,
    compressible,
    decompress,
    encodable,
    gzip,
    negotiable,
    negotiated,
    shared,
    vary,
)
from respcache.core.encoding import zstd as library

TEXT = (
    b'[{"name":"Apex Foods 1","city":"Berlin","score":71},{"name":"Cedar Labs '
    b'2","city":"Lyon","score":12}]' * 40
)
JSON = (b"content-type", b"application/json")
LIMIT = 64 * 1024


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        # The examples of RFC 9110, section 12.5.3.
        (b"compress, gzip", ContentCoding.gzip),
        (b"", ContentCoding.identity),
        (b"*", ContentCoding.zstd),
        (b"compress;q=0.5, gzip;q=1.0", ContentCoding.gzip),
        (b"gzip;q=1.0, identity; q=0.5, *;q=0", ContentCoding.gzip),
        # What clients send.
        (None, ContentCoding.identity),
        (b"gzip, deflate, br, zstd", ContentCoding.zstd),
        (b"gzip, deflate, br", ContentCoding.gzip),
        (b"gzip, deflate", ContentCoding.gzip),
        (b"identity", ContentCoding.identity),
        (b"deflate, br", ContentCoding.identity),
        # Weights.
        (b"zstd;q=0.5, gzip", ContentCoding.gzip),
        (b"zstd;q=0.5, gzip;q=0.5", ContentCoding.zstd),
        (b"gzip;q=0.501, zstd;q=0.5", ContentCoding.gzip),
        (b"gzip;q=0.5, zstd;q=0.49", ContentCoding.gzip),
        (b"gzip;q=1, zstd;q=0.999", ContentCoding.gzip),
        (b"gzip;q=0.1", ContentCoding.gzip),
        (b"gzip;q=0.4, identity;q=0.5", ContentCoding.identity),
        (b"gzip;q=0.5, identity;q=0.5", ContentCoding.gzip),
        (b"gzip;q=0", ContentCoding.identity),
        (b"gzip;q=0.000, zstd;q=0.", ContentCoding.identity),
        (b"zstd;q=0, gzip;q=1.", ContentCoding.gzip),
        (b"gzip;q=0.001", ContentCoding.gzip),
        # The asterisk stands for what is not named, identity too.
        (b"zstd;q=0, *", ContentCoding.gzip),
        (b"gzip;q=0.5, *;q=0.1", ContentCoding.gzip),
        (b"gzip;q=0.1, *;q=0.5", ContentCoding.zstd),
        (b"identity, *;q=0.5", ContentCoding.identity),
        (b"gzip;q=0.1, zstd;q=0.2, *;q=0.5", ContentCoding.identity),
        (b"*;q=0", ContentCoding.identity),
        (b"*;q=0, gzip", ContentCoding.gzip),
        # Nothing that we have is acceptable: plain all the same.
        (b"identity;q=0", ContentCoding.identity),
        (b"br, identity;q=0, *;q=0", ContentCoding.identity),
        (b"identity;q=0, gzip;q=0.1", ContentCoding.gzip),
        # Spelling.
        (b"GZip", ContentCoding.gzip),
        (b"ZSTD;Q=0.9", ContentCoding.zstd),
        (b"x-gzip", ContentCoding.gzip),
        (b"x-gzip;q=0, gzip", ContentCoding.identity),
        (b"x-zstd", ContentCoding.identity),
        (b" \t gzip \t;\t q=0.5 ,zstd ; q=0.4 ", ContentCoding.gzip),
        (b",, gzip,,", ContentCoding.gzip),
        (b"gzip,br,zstd;q=0", ContentCoding.gzip),
        (b"gzip;q=0, gzip", ContentCoding.identity),
        (b"gzip, gzip;q=0", ContentCoding.identity),
        # Malformed: plain.
        (b"gzip;q=2", ContentCoding.identity),
        (b"gzip;q=1.001", ContentCoding.identity),
        (b"gzip;q=0.1234", ContentCoding.identity),
        (b"gzip;q=-1", ContentCoding.identity),
        (b"gzip;q=", ContentCoding.identity),
        (b"gzip;q", ContentCoding.identity),
        (b"gzip;q = 1", ContentCoding.identity),
        (b"gzip;level=9", ContentCoding.identity),
        (b"gzip zstd", ContentCoding.identity),
        (b"gzip\n", ContentCoding.identity),
        (b"zstd, gz\xc3\xafp", ContentCoding.identity),
        (b"gzip;q=nan, zstd", ContentCoding.identity),
    ],
)
def test_accept_encoding_is_read_as_the_rfc_says(
    header: bytes | None, coding: ContentCoding
) -> None:
    """RFC 9110, section 12.5.3; in doubt, plain bytes."""
    assert accepted(header) is coding


@given(st.binary(max_size=300) | st.text("gzipstd*;q=01., identity-x", max_size=60).map(str.encode))
def test_no_header_raises_or_invents_a_coding(header: bytes) -> None:
    """Whatever a client sends, it gets something it named, or plain bytes."""
    coding = accepted(header)
    assert coding is ContentCoding.identity or coding.encode() in header.lower() or b"*" in header


@given(
    st.dictionaries(st.sampled_from(["gzip", "zstd", "identity", "br", "*"]), st.integers(0, 1000))
)
def test_the_heaviest_acceptable_coding_wins(weights: dict[str, int]) -> None:
    """Against the rule, spelled out plainly: no other acceptable coding is heavier, and a tie goes
    to the smaller body."""
    header = ", ".join(f"{name};q={weight / 1000:.3f}" for name, weight in weights.items()).encode()
    named = {name: weights.get(name, weights.get("*", -1)) for name in ("zstd", "gzip", "identity")}
    heaviest = max(named.values())
    best = next(name for name, weight in named.items() if weight == heaviest)
    assert accepted(header) == (best if heaviest > 0 else "identity")


def memo() -> Any:
    """Return how the choices of the past are remembered."""
    return encoding._choose.cache_info()  # private: what is remembered shows nowhere else


def test_a_flood_of_values_does_not_grow_the_memo() -> None:
    """Neither by their number nor by their length."""
    for number in range(4 * encoding.MAX_ACCEPT_VALUES):
        accepted(b"gzip, c%d" % number)
    assert memo().currsize <= encoding.MAX_ACCEPT_VALUES
    before = memo()
    assert accepted(b"gzip, ".ljust(encoding.MAX_ACCEPT_BYTES + 1, b"x")) is ContentCoding.identity
    assert memo() == before
    assert accepted(b"gzip, ".ljust(encoding.MAX_ACCEPT_BYTES, b"x")) is ContentCoding.gzip


def test_a_known_value_is_not_read_again() -> None:
    """The memo is what makes the choice cheap enough for every hit."""
    accepted(b"gzip, br;q=0.321")
    before = memo().hits
    accepted(b"gzip, br;q=0.321")
    assert memo().hits == before + 1


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/json", True),
        (b"Application/JSON; charset=utf-8", True),
        (b"application/problem+json", True),
        (b"text/csv", True),
        (b"text/html;charset=utf-8", True),
        (b"application/javascript", True),
        (b"text/javascript", True),
        (b"application/xml", True),
        (b"application/atom+xml", True),
        (b"image/svg+xml ; a=b", True),
        (b"image/png", False),
        (b"application/pdf", False),
        (b"application/octet-stream; name=text/plain", False),
        (b"application/jsonp", False),
        (b"", False),
        (None, False),
    ],
)
def test_text_is_compressible(content_type: bytes | None, expected: bool) -> None:
    """By its media type, whatever its case and parameters."""
    assert compressible(content_type) is expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([JSON], True),
        ([(b"Content-Type", b"application/json")], True),
        ([(b"content-type", b"image/png")], False),
        ([], False),
        ([JSON, (b"Content-Encoding", b"br")], False),
        ([JSON, (b"content-encoding", b"identity")], False),
        ([JSON, (b"Cache-Control", b"max-age=1, No-Transform")], False),
        ([JSON, (b"cache-control", b"max-age=1")], True),
        ([JSON, (b"ETag", b'"v1"')], False),
        ([JSON, (b"etag", b'W/"v1"')], True),
    ],
)
def test_the_handler_can_keep_its_bytes(headers: list[tuple[bytes, bytes]], expected: bool) -> None:
    """By a coding of its own, by no-transform, and by a strong entity tag, which names these very
    bytes."""
    assert encodable(headers) is expected


def test_short_answers_are_not_negotiated() -> None:
    """They are plain for everybody, so no Vary is needed; what is not encodable stays so at any
    length."""
    assert not negotiable([JSON], length=encoding.MIN_BYTES - 1)
    assert negotiable([JSON], length=encoding.MIN_BYTES)
    assert not negotiable([JSON, (b"etag", b'"v1"')], length=encoding.MIN_BYTES)


@given(
    st.binary(max_size=3000)
    | st.builds(bytes.__mul__, st.binary(min_size=1, max_size=80), st.integers(100, 900))
)
def test_what_was_compressed_comes_back(body: bytes) -> None:
    """Through zstd, if it was worth it, and through gzip always."""
    packed = compress(body)
    assert packed is None or decompress(packed, max_bytes=len(body)) == body
    assert standard_gzip.decompress(gzip(body)) == body


def test_only_what_pays_is_compressed() -> None:
    """Not what is small, not noise, not what saves less than a tenth."""
    assert compress(TEXT[: encoding.MIN_BYTES - 1]) is None
    assert compress(TEXT[: encoding.MIN_BYTES]) is not None
    noise = random.Random(1).randbytes(4000)
    assert compress(noise) is None
    assert compress(noise + bytes(300)) is None
    packed = compress(noise + bytes(700))
    assert packed is not None
    assert len(packed) <= 0.9 * 4700


def test_any_client_may_be_sent_the_frame() -> None:
    """RFC 9659: a client need not grant a window of more than 8 MiB; a longer body does not make
    ours longer."""
    packed = compress(random.Random(1).randbytes(1000) * 9500)
    assert packed is not None
    single_segment, window = packed[4] & 0x20, packed[5]  # RFC 8878, section 3.1.1.1
    assert not single_segment
    assert (1 << 10 + (window >> 3)) * (1 + (window & 7) / 8) <= 8 * 1024 * 1024


def test_gzip_is_the_same_every_time() -> None:
    """Its header holds no time."""
    assert gzip(TEXT)[4:8] == bytes(4)
    assert gzip(TEXT) == gzip(TEXT)


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_sizes_at_the_edges_of_blocks_come_back(blocks: int, more: int) -> None:
    """The output is limited to just the size; the checksum behind it must be read all the same."""
    chance = random.Random(blocks)
    body = bytes(chance.choices(b"abcdefgh", k=blocks * 128 * 1024 + more))
    packed = compress(body)
    assert packed is not None
    assert decompress(packed, max_bytes=len(body)) == body


def test_a_body_may_be_as_long_as_the_limit_and_no_longer() -> None:
    """To the byte."""
    packed = compress(TEXT)
    assert packed is not None
    assert decompress(packed, max_bytes=len(TEXT)) == TEXT
    assert decompress(packed, max_bytes=len(TEXT) - 1) is None
    assert decompress(packed, max_bytes=-2) is None


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_frame_is_never_read_as_another_body(position: int, flip: int) -> None:
    """Wherever a byte is wrong; there is a checksum for those that decode."""
    data = bytearray(compress(TEXT) or b"")
    data[position % len(data)] ^= flip
    assert decompress(bytes(data), max_bytes=LIMIT) in (None, TEXT)


def test_a_cut_or_lengthened_frame_is_damaged() -> None:
    """Also where all of the body is there and only the checksum is not."""
    packed = compress(TEXT)
    assert packed is not None
    assert all(
        decompress(packed[:length], max_bytes=LIMIT) is None for length in range(len(packed))
    )
    assert decompress(packed + b"\0", max_bytes=LIMIT) is None
    assert decompress(packed + packed, max_bytes=LIMIT) is None


@given(st.binary(max_size=100), st.booleans())
def test_no_bytes_raise(data: bytes, magic: bool) -> None:
    """What is no frame is None, not an error in a request."""
    body = decompress(b"\x28\xb5\x2f\xfd" * magic + data, max_bytes=LIMIT)
    assert body is None or len(body) <= LIMIT


def test_a_frame_that_does_not_state_its_size_is_not_ours() -> None:
    """So libzstd's buffer has a bound before it is made."""
    compressor = library.ZstdCompressor()
    data = compressor.compress(TEXT[:100]) + compressor.compress(TEXT[100:]) + compressor.flush()
    assert library.decompress(data) == TEXT
    assert decompress(data, max_bytes=LIMIT) is None


@pytest.mark.parametrize("window_log", [10, 14, 27])
@pytest.mark.parametrize("stated", [1000, LIMIT, 32 * 1024 * 1024])
def test_a_bomb_in_the_store_does_not_eat_memory(stated: int, window_log: int) -> None:
    """What unfolds to 32 MiB, with the truth about its size and with lies, and with windows that
    libzstd treats differently."""
    data = bomb(stated=stated, size=32 * 1024 * 1024, window_log=window_log)
    tracemalloc.start()
    try:
        assert decompress(data, max_bytes=LIMIT) is None
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window_log", [10, 14, 27])
def test_the_bomb_is_one(window_log: int) -> None:
    """With the truth about its size it is a frame like any other (RFC 8878), so the test above
    tests something."""
    size = 512 * 1024
    assert library.decompress(bomb(stated=size, size=size, window_log=window_log)) == b"a" * size


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ([], b"Accept-Encoding"),
        ([b""], b"Accept-Encoding"),
        ([b"X-View"], b"X-View, Accept-Encoding"),
        ([b"accept-encoding"], b"accept-encoding"),
        (
            [b"X-View,Accept-Encoding , Accept-Language"],
            b"X-View, Accept-Encoding, Accept-Language",
        ),
        ([b"X-View", b"Accept-Language"], b"X-View, Accept-Language, Accept-Encoding"),
        ([b"accept-encoding", b"Accept-Encoding"], b"Accept-Encoding"),
        ([b"X-Accept-Encoding"], b"X-Accept-Encoding, Accept-Encoding"),
        ([b"*"], b"*"),
    ],
)
def test_vary_is_merged_and_not_doubled(given_values: list[bytes], expected: bytes) -> None:
    """One line that holds the handler's names and ours."""
    names = itertools.cycle([b"Vary", b"vary"])
    headers = [JSON, *zip(names, given_values, strict=False)]
    assert vary(headers) == (JSON, (b"vary", expected))
    assert vary(vary(headers)) == vary(headers)


@pytest.mark.parametrize("coding", ContentCoding)
def test_the_headers_say_what_is_sent(coding: ContentCoding) -> None:
    """Length, coding and Vary, each once; the others as they were, in their order."""
    stored = (
        JSON,
        (b"content-length", b"4000"),
        (b"vary", b"X-View"),
        (b"etag", b'W/"v1"'),
        (b"x-total-count", b"7"),
    )
    headers = negotiated(shared(stored), coding=coding, length=900)
    said = {b"content-encoding": coding.encode()} if coding is not ContentCoding.identity else {}
    assert dict(headers) == {
        **dict(stored),
        **said,
        b"content-length": b"900",
        b"vary": b"X-View, Accept-Encoding",
    }
    assert len(headers) == len(dict(headers))
    assert [pair for pair in headers if pair in stored] == [
        JSON,
        (b"etag", b'W/"v1"'),
        (b"x-total-count", b"7"),
    ]


def test_a_length_in_another_case_or_none_gives_one_length() -> None:
    """The first answer has the handler's own spelling."""
    for stored in ([(b"Content-Length", b"5")], []):
        found = negotiated(shared(stored), coding=ContentCoding.identity, length=5)
        assert found == ((b"vary", b"Accept-Encoding"), (b"content-length", b"5"))


def test_every_coding_has_the_same_vary() -> None:
    """Or a cache between us and the client gives zstd to one who asked for plain bytes (RFC 9110,
    section 12.5.5)."""
    assert (
        len(
            {
                dict(negotiated(shared([JSON]), coding=coding, length=1))[b"vary"]
                for coding in ContentCoding
            }
        )
        == 1
    )


def bomb(*, stated: int, size: int, window_log: int) -> bytes:
    """Make a frame of run-length blocks that unfolds to ``size`` bytes and says ``stated`` (RFC
    8878, section 3.1.1)."""
    block = min(1 << window_log, 128 * 1024)
    blocks = size // block
    head = b"\x28\xb5\x2f\xfd" + bytes([2 << 6, window_log - 10 << 3]) + struct.pack("<I", stated)
    run = struct.pack("<I", 1 << 1 | block << 3)[:3] + b"a"
    return head + run * (blocks - 1) + bytes([run[0] | 1]) + run[1:]
