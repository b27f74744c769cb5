"""Any rule that the daemon could want, for property tests."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from hypothesis import strategies as st

from backends.kernel_state import Rule


def cidrs(family: int) -> st.SearchStrategy[str]:
    """A network in CIDR form, perhaps negated; never "everywhere", which is spelled as no condition."""
    bits, network = (32, IPv4Network) if family == 4 else (128, IPv6Network)

    def make(address: int, length: int, negated: bool) -> str:
        base = address >> (bits - length) << (bits - length)
        return f"{'!' if negated else ''}{network((base, length))}"

    return st.builds(make, st.integers(0, 2**bits - 1), st.integers(1, bits), st.booleans())


@st.composite
def marks(draw: st.DrawFn) -> str:
    bit = 1 << draw(st.integers(0, 31))
    return f"{bit:#x}/{bit:#x}"


@st.composite
def rules(draw: st.DrawFn, family: int) -> Rule:
    chain = draw(st.sampled_from(("postrouting", "forward")))
    verdict = draw(
        st.sampled_from(("return", "accept", "masquerade") if chain == "postrouting" else ("return", "accept"))
    )
    return Rule(
        chain,
        verdict,
        src=draw(st.none() | cidrs(family)),
        dst=draw(st.none() | cidrs(family)),
        mark=draw(st.none() | marks()),
        random_fully=draw(st.booleans()) if verdict == "masquerade" else False,
    )
