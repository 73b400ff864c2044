"""The shells of a node: ``erl -remsh`` of stock OTP, ``ctl remsh``, ``ctl shell``, and ``rpc``."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from bridge.term import Atom, Term
from ops.erlang import OLDEST, from_path
from tests.otp.cluster import NEWEST, WAIT_S, each_otp, stock_node
from tests.otp.shell_node import WORDS, ShellNode, plain_env, shell_node
from tests.otp.stock import Erl, ErlangError, Otp
from tests.otp.terminal import Screen, Terminal
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.erlang, pytest.mark.slow]

A = Atom
PROMPT = "(n@127.0.0.1){}> "
RESTARTED = "restarts 1"


@each_otp()
async def test_a_session_of_a_stock_client(otp: Otp, tmp_path: Path) -> None:
    async with shell_node(tmp_path) as made:
        args = ("-name", "me@127.0.0.1", "-setcookie", made.cookie, "-remsh", "n@127.0.0.1")
        async with Terminal(otp, made.epmd_port, *args) as screen:
            banner = await screen.until(PROMPT.format(1))
            # OTP 25 shows its own.
            assert otp.release < 26 or ("Phalanx" in banner and "help()." in banner)
            await _session(screen, made)
            if otp.release >= 26:
                screen.type("\x04")
            else:  # this client would ask for another job
                screen.type("q().\n")
            assert await screen.ended() == 0, screen.seen


@contextlib.asynccontextmanager
async def shell_and_erl(root: Path, otp: Otp) -> AsyncIterator[tuple[ShellNode, Erl]]:
    async with shell_node(root) as made, stock_node(otp, made.epmd_port, cookie=made.cookie) as erl:
        yield made, erl


async def _session(screen: Screen, made: ShellNode) -> None:
    first = made.node.whereis("scheduler")
    for number, (typed, shown) in enumerate(
        [
            ("node().", ["'n@127.0.0.1'"]),
            ("help().", ["status().", "kill(Name).", "load(Model", "phalanx:status()", "q()."]),
            ("phalanx:leader().", ["{ok,'n@127.0.0.1'}"]),
            ("leader().", ["{ok,'n@127.0.0.1'}"]),
            ("status().", ['cluster => <<"lab">>', 'id => <<"lama-1">>', "state => ready"]),
            ("nodes().", ["name => 'n@127.0.0.1'"]),
            ("topology().", ['from => <<"m@10.0.0.2">>', 'kind => <<"ethernet">>']),
            ("instances().", ["lama-1"]),
            ("tree().", ["root_sup", "\n  cluster_sup", "\n    scheduler", "<0.", "one_for_one"]),
            ("state(scheduler).", ['#{instances => [<<"lama-1">>]}']),
            ('state("cluster_sup").', ["strategy => one_for_one"]),
            ("kill(scheduler).", ["{ok,<0."]),
            ("tree().", [RESTARTED]),
            ("state(scheduler).", ["#{instances =>"]),
            ("state(nobody).", ["{error,", "not_found", "scheduler"]),
            ("kill(nobody).", ["{error,", "not_found", "'nobody'"]),
            ("kill(pid(0, 99999, 0)).", ["not_found"]),
            ('load("tiny", #{slots => 4, engine => "torch"}).', ['{ok,<<"tiny-1">>}']),
            ('load("nonsense").', ["{error,unknown_model,"]),
            ("load({x}).", ["** exception error: badarg"]),
            ('unload("lama-1").', ["ok"]),
            ('swap("lama", "tiny").', ['{ok,<<"lama-1">>}']),
            ('generate("lama", "hi", #{max_tokens => 3}).', ["{ok,", "heard 2 grüß", "total"]),
            ('generate("lama", "fail").', ["{error,generation,", "the rank is lost"]),
            ("a b.", ["* 1:3: syntax error before: b"]),
            ("foo().", ["** exception error: undefined shell command foo/0"]),
            ("phalanx:kill(scheduler).", ["undefined function phalanx:kill/1"]),
            ('os:cmd("id").', ["** exception error: undefined function os:cmd/1"]),
        ],
        start=2,
    ):
        screen.type(typed + "\n")
        answer = await screen.until(PROMPT.format(number))
        assert [text for text in shown if text not in answer] == [], f"{typed} {answer}"
    assert made.node.whereis("scheduler") not in (None, first)
    assert "load tiny [('engine', b'torch'), ('slots', 4)]" in made.seen()


@each_otp()
async def test_peers_call_phalanx_and_nothing_else(otp: Otp, tmp_path: Path) -> None:
    async with shell_and_erl(tmp_path / "home", otp) as (made, erl):
        for module in ("rpc", "erpc"):
            await _allowed(erl, module)
        kept = tmp_path / "kept"
        kept.write_text("here")
        for module, function, arguments in [
            ("os", "cmd", f'["rm {kept}"]'),
            ("erlang", "halt", "[]"),
            ("init", "stop", "[]"),
            ("file", "delete", f'["{kept}"]'),
            ("erlang", "apply", f'[file, delete, ["{kept}"]]'),
            ("erlang", "whereis", "[scheduler]"),
            ("phalanx", "kill", "[scheduler]"),
            ("phalanx", "status", "[1]"),
        ]:
            call = f"('n@127.0.0.1', {module}, {function}, {arguments})"
            found = await erl.eval(f"rpc:call{call}")
            assert found[0] == A("badrpc")
            assert found[1][:2] == (A("EXIT"), (A("undef"), found[1][1][1]))
            assert found[1][1][1][0][:2] == (A(module), A(function))
            with pytest.raises(ErlangError) as caught:
                await erl.eval(f"erpc:call{call}")
            assert caught.value.reason[:2] == (A("exception"), A("undef"))
            await erl.eval(f"erpc:cast{call}")
        assert await erl.eval("net_adm:ping('n@127.0.0.1')") == A("pong")
        assert kept.read_text() == "here"
        assert made.node.whereis("scheduler") is not None


async def _allowed(erl: Erl, module: str) -> None:
    async def call(text: str) -> Term:
        return await erl.eval(f"{module}:call('n@127.0.0.1', phalanx, {text})")

    assert await call("leader, []") == (A("ok"), A("n@127.0.0.1"))
    status = await call("status, []")
    assert status[A("node")] == A("n@127.0.0.1")
    assert status[A("cluster")] == b"lab"
    (instance, *_) = await call("instances, []")
    assert instance[A("id")] == b"lama-1"
    assert (await call("nodes, []"))[0][A("state")] == A("up")
    assert (await call("topology, []"))[0][A("kind")] == b"ethernet"
    for model in ('"tiny"', '<<"tiny">>', "tiny"):
        assert await call(f"load, [{model}]") == (A("ok"), b"tiny-1")
    assert await call('load, ["tiny", [{slots, 2}]]') == (A("ok"), b"tiny-1")
    assert (await call('load, ["nonsense", #{}]'))[:2] == (A("error"), A("unknown_model"))
    assert await call('unload, ["lama-1"]') == A("ok")
    assert await call("swap, [lama, tiny]") == (A("ok"), b"lama-1")
    answer = await call('generate, ["lama", "hi", #{stop => ["a", "b"]}]')
    assert answer == (A("ok"), WORDS.encode(), {})
    bad = await erl.eval(f"catch {module}:call('n@127.0.0.1', phalanx, load, [{{a}}])")
    assert "badarg" in repr(bad)


async def test_a_stock_process_gets_the_tokens(tmp_path: Path) -> None:
    async with shell_and_erl(tmp_path, NEWEST[0]) as (_, erl):
        ok, ref = await erl.eval(
            "rpc:call('n@127.0.0.1', phalanx, generate, [lama, \"hi\", #{stream_to => self()}])"
        )
        assert ok == A("ok")
        loop = (
            "F = fun F(L) -> receive {phalanx, R, {done, W, _}} -> {lists:reverse(L), W};"
            " {phalanx, R, T} -> F([T | L]) after 9000 -> L end end, F([])"
        )
        tokens, why = await erl.eval(loop, R=ref)
        assert [index for _, index, _ in tokens] == [0, 1, 2]
        assert why == A("stop")


@pytest.mark.skipif(not NEWEST, reason="no OTP")
async def test_ctl_remsh_on_a_terminal(tmp_path: Path) -> None:
    async with shell_node(tmp_path) as made:
        state = made.home.state_dir
        async with Screen(made.ctl("remsh"), plain_env()) as screen:
            await screen.until(PROMPT.format(1))
            (folder,) = state.glob("remsh-*")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / ".erlang.cookie").stat().st_mode) == 0o400
            _assert_secret(made.cookie)
            screen.type("phalanx:leader().\n")
            assert "{ok,'n@127.0.0.1'}" in await screen.until(PROMPT.format(2))
            screen.type("q().\n")
            assert await screen.ended() == 0
        assert list(state.glob("remsh-*")) == []
        async with Screen(made.ctl("remsh"), plain_env()) as screen:
            await screen.until(PROMPT.format(1))
            screen.type("\x1b[A")  # the history of the first shell
            await screen.until("q().")
            screen.type("\x1b[A")
            await screen.until("phalanx:leader().")
            screen.type("\n")
            assert "{ok,'n@127.0.0.1'}" in await screen.until(PROMPT.format(2))
            screen.type("\x03")
            # Its own menu, which is up to it: our command has not ended.
            _children(made)[0].terminate()
            assert await screen.ended() in (0, 143)
        assert list(state.glob("remsh-*")) == []


def _children(made: ShellNode) -> list[psutil.Process]:
    home = str(made.home.root)
    return [p for p in psutil.process_iter(["cmdline"]) if _is_remsh(p, home)]


def _is_remsh(process: psutil.Process, home: str) -> bool:
    line = process.info["cmdline"] or []
    return line[-2:] == ["--home", home] and "remsh" in line


def _assert_secret(cookie: str) -> None:
    """Nobody who lists processes sees the cookie."""
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        for name in ("cmdline", "environ"):
            try:
                found = (folder / name).read_bytes()
            except OSError:  # it ended, or is not ours to read
                continue
            assert cookie.encode() not in found, folder


@pytest.mark.skipif(not NEWEST, reason="no OTP")
async def test_ctl_remsh_with_piped_lines(tmp_path: Path) -> None:
    async with shell_node(tmp_path) as made:
        status, out, err = await _piped(made.ctl("remsh"), "node().\nphalanx:leader().\n")
        assert (status, err) == (0, "")
        assert "{ok,'n@127.0.0.1'}" in out
        made.home.remove_run()
        status, out, err = await _piped(made.ctl("remsh"), "")
        assert status == 3
        assert "no node runs on the home" in err


async def test_ctl_remsh_over_tls(tmp_path: Path) -> None:
    otp = from_path()
    if otp is None or not otp.has_ssl or otp.release < OLDEST:
        pytest.skip("no OTP with ssl on PATH")
    async with (
        shell_node(tmp_path, tls=True) as made,
        Screen(made.ctl("remsh"), plain_env()) as screen,
    ):
        await screen.until(PROMPT.format(1))
        _assert_secret(made.cookie)
        screen.type("phalanx:leader().\n")
        assert "{ok,'n@127.0.0.1'}" in await screen.until(PROMPT.format(2))
        screen.type("q().\n")
        assert await screen.ended() == 0


async def test_ctl_shell_with_piped_lines(tmp_path: Path) -> None:
    lines = """\
# a comment, and an empty line

status()
tree()
state("scheduler")
kill("scheduler")
tree()
kill("nobody")
load("tiny", slots=2)
generate("lama", "hi", max_tokens=3)
leader
__import__("os").system("id")
leader()
"""
    async with shell_node(tmp_path) as made:
        first = made.node.whereis("scheduler")
        status, out, err = await _piped(made.ctl("shell"), lines)
        assert status == 0, err
        for text in ("cluster lab", "├── cluster_sup", "instances: lama-1", "killed scheduler"):
            assert text in out
        assert RESTARTED in out
        assert "heard 2 grüß" in out
        assert out.endswith("n@127.0.0.1\n")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert [line.partition(";")[0][:44] for line in errors] == [
            "error: no process is registered as 'nobody' ",
            "error: leader is not called: write leader(),",
            "error: only calls of this shell's functions,",
        ]
        assert made.node.whereis("scheduler") not in (None, first)
        assert "load tiny [('slots', 2)]" in made.seen()
        status, out, err = await _piped(made.ctl("shell"), "leader()\nunload(3)\nexit\nleader()")
        assert (status, out) == (1, "n@127.0.0.1\n")
        assert err.startswith("error: unload: ")
        status, out, _ = await _piped(made.ctl("shell", "--node", "n@127.0.0.1"), "leader()\n")
        assert (status, out) == (0, "n@127.0.0.1\n")


async def test_ctl_shell_on_a_terminal(tmp_path: Path) -> None:
    async with shell_node(tmp_path) as made:
        async with Screen(made.ctl("shell"), plain_env()) as screen:
            await screen.until("n@127.0.0.1>")
            screen.type("lea\t")
            await screen.until("leader(")
            screen.type(")\r")
            await screen.until("\nn@127.0.0.1")
            await screen.until("n@127.0.0.1>")
            screen.type('kill("sch\t')
            await screen.until("eduler")
            screen.type('")\r')
            await screen.until("killed scheduler")
            await screen.until("n@127.0.0.1>")
            screen.type('generate("lama", "forever")\r')
            await screen.until("and so on")
            _children_of_shell(made)[0].send_signal(2)
            await screen.until("(stopped)")
            await wait_until_async(lambda: "cancelled" in made.seen(), WAIT_S)
            await screen.until("n@127.0.0.1>")
            screen.type("nonsense()\r")
            await screen.until("error: no function nonsense; there are: status, nodes")
            await screen.until("n@127.0.0.1>")
            screen.type("\x04")
            assert await screen.ended() == 0
        history = made.home.state_dir / "shell_history"
        assert '+kill("scheduler")' in history.read_text()
        assert history.stat().st_mode & 0o077 == 0


def _children_of_shell(made: ShellNode) -> list[psutil.Process]:
    home = str(made.home.root)
    found = psutil.Process().children(recursive=True)
    return [p for p in found if "shell" in p.cmdline() and home in p.cmdline()]


async def _piped(argv: list[str], text: str) -> tuple[int, str, str]:
    """Run a command with ``text`` as its input: status, stdout, stderr."""
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=plain_env(),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(30):
            out, err = await child.communicate(text.encode())
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()
