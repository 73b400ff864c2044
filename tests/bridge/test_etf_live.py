"""The codec against a running stock emulator, bit for bit in both directions."""

from __future__ import annotations

import pytest

from bridge import etf
from bridge.term import Atom
from tests.bridge.terms import examples, terms, terms_without_maps
from tests.otp.stock import Erl, Otp, installations

pytestmark = [pytest.mark.erlang, pytest.mark.slow]

per_release = pytest.mark.parametrize("otp", installations(), ids=str)


@per_release
async def test_random_terms_come_back_bit_for_bit(otp: Otp) -> None:
    sent = [etf.encode(term) for term in examples(terms_without_maps, 400)]
    async with Erl(otp) as erl:
        back = await erl.eval(
            "[term_to_binary(binary_to_term(B), [{minor_version, 2}]) || B <- Sent]", Sent=sent
        )
    if otp.release < 28:  # writes ports of small numbers as NEW_PORT_EXT
        back = [etf.encode(etf.decode(data)) for data in back]
    assert back == sent


@per_release
async def test_random_terms_with_maps_stay_equal(otp: Otp) -> None:
    # The emulator writes a map in its own order, so the terms are compared where they came from.
    sent = [etf.encode(term) for term in examples(terms, 400)]
    async with Erl(otp) as erl:
        theirs = await erl.eval("[term_to_binary(binary_to_term(B)) || B <- Sent]", Sent=sent)
        ours = [etf.encode(etf.decode(data)) for data in theirs]
        same = "[binary_to_term(A) =:= binary_to_term(B) || {A, B} <- lists:zip(Sent, Ours)]"
        assert await erl.eval(same, Ours=ours) == [True] * len(sent)


# Real terms of a running system: funs, ports, references, deep maps, improper lists, bignums.
REAL = """
  Started = application:ensure_all_started(crypto),
  Apps = [A || {A, _, _} <- application:loaded_applications()],
  Servers = [P || P <- [kernel_sup, kernel_safe_sup, code_server, rex], whereis(P) =/= undefined],
  Terms = [
    [process_info(P) || P <- processes()],
    [erlang:port_info(P) || P <- erlang:ports()],
    [sys:get_status(P) || P <- Servers],
    [application:get_all_key(A) || A <- Apps],
    [M:module_info() || {M, _} <- code:all_loaded()],
    [{ets:info(T), catch ets:tab2list(T)} || T <- ets:all()],
    erlang:memory(), erlang:system_info(system_architecture), os:getenv(), Started,
    make_ref(), alias(), self(), erlang:ports(), fun lists:map/2, [fun(X) -> {X, Started} end],
    <<1:1>>, 1 bsl 5000, -0.0, [a | b], #{1 => a, 1.0 => b, [] => c, #{} => d},
    maps:from_list([{N, N} || N <- lists:seq(1, 100)])
  ]
"""


@per_release
async def test_all_that_a_running_system_holds_survives(otp: Otp) -> None:
    async with Erl(otp) as erl:
        await erl.eval(REAL + ", ok")
        data = await erl.eval("B = term_to_binary(Terms)")
        back = etf.encode(etf.decode(data))
        # Funs and references of the emulator must come back as the very same ones.
        assert await erl.eval("binary_to_term(Back) =:= binary_to_term(B)", Back=back) is True
        assert await erl.eval("binary_to_term(Back) =:= Terms") is True
        assert len(data) > 100_000


@per_release
async def test_a_fun_comes_back_and_still_runs(otp: Otp) -> None:
    async with Erl(otp) as erl:
        fun = await erl.eval("K = 40, fun(X) -> X + K end")
        assert await erl.eval("F(2)", F=fun) == 42


@per_release
async def test_compressed_and_old_forms_of_big_terms_are_read(otp: Otp) -> None:
    async with Erl(otp) as erl:
        for options in ("[compressed]", "[{compressed, 9}]", "[{minor_version, 0}]"):
            text = "[{hello, N, 1.5, 'h\\x{e9}'} || N <- lists:seq(1, 999)]"
            data = await erl.eval(f"term_to_binary({text}, {options})")
            expected = [(Atom("hello"), n, 1.5, Atom("h\u00e9")) for n in range(1, 1000)]
            assert etf.decode(data) == expected
