import pytest

from moe_server.address import check_address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:0",
        "localhost:65535",
        "moe-server_2.example:80",
        "[::]:50051",
        "[fe80::1%eth0]:5",
        "unix:/run/moe.sock",
        "unix:relative",
        "unix:" + "a" * 107,
    ],
)
def test_what_is_taken(address):
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "expected HOST:PORT"),
        ("0", "expected HOST:PORT"),
        ("127.0.0.1", "expected HOST:PORT"),
        ("nonsense", "expected HOST:PORT"),
        (":50051", "expected HOST:PORT"),
        ("127.0.0.1:99999", "'99999', expected a number from 0 to 65535"),
        ("127.0.0.1: 5", "' 5'"),
        ("127.0.0.1:-1", "'-1'"),
        ("127.0.0.1:\u0665", "expected a number"),
        ("localhost:abc", "'abc'"),
        ("localhost:", "the port is ''"),
        ("::1:50152", "brackets: [::1]:50152"),
        ("[::1:50152", "brackets: [::1]:50152"),
        ("[nonsense]:1", "expected an IPv6 address"),
        ("two words:1", "'two words'"),
        ("http://localhost:1", "brackets"),
        ("unix:", "0 bytes"),
        ("unix:" + "a" * 108, "108 bytes"),
    ],
)
def test_what_is_refused(address, problem):
    with pytest.raises(ValueError, match=r"expected|brackets") as caught:
        check_address(address)
    assert problem in str(caught.value)


def test_a_client_cannot_dial_port_0():
    with pytest.raises(ValueError, match="from 1 to 65535"):
        check_address("localhost:0", min_port=1)
