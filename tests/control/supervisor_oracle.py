"""Runs a supervisor script on OTP's own ``supervisor``, in an evaluating ``erl``."""

from __future__ import annotations

import struct

from bridge.term import Term
from tests.otp.stock import Erl

# Definitions first; Run(Script) gives {Events, Replies}. One script at a time: `collector` is the
# one process that sees all, in order: the emulator has one scheduler.
_DRIVER = r"""
Ask = fun(What) ->
  Ref = make_ref(), collector ! {ask, self(), Ref, What}, receive {Ref, Value} -> Value end
end,
Collect = fun Loop(S) ->
  #{events := Es, labels := Ls, known := Ks, alive := As, tries := Ts, calls := Cs,
    replies := Rs, waits := Ws} = S,
  receive
    {event, E} -> Loop(S#{events := [E | Es]});
    {replied, I, R} -> Loop(S#{replies := [{I, R} | Rs]});
    {'DOWN', _, process, P, R} ->
      case Ws of #{P := {Waiter, WRef}} -> Waiter ! {WRef, ok}; _ -> ok end,
      Loop(S#{events := [{stop, P, R} | Es], alive := lists:delete(P, As)});
    {ask, Who, Ref, What} ->
      case What of
        {attempt, Key} ->
          K = maps:get(Key, Ts, 0),
          Who ! {Ref, K},
          Loop(S#{tries := Ts#{Key => K + 1}, events := [{start, Key, K} | Es]});
        {started, P, Key} ->
          monitor(process, P),
          Who ! {Ref, ok},
          Loop(S#{labels := Ls#{P => {pid, Key, length(Ks)}}, known := Ks ++ [P],
                  alive := As ++ [P]});
        {issue, Sup, Request} ->
          Me = self(),
          spawn(fun() ->
            Id = gen_server:send_request(Sup, Request),
            Who ! {Ref, ok},
            R = case gen_server:wait_response(Id, infinity) of
              {reply, X} -> {reply, X};
              {error, {Why, _}} -> {exit, Why}
            end,
            Me ! {replied, Cs, R}
          end),
          Loop(S#{calls := Cs + 1});
        {await, P} ->
          case lists:member(P, As) of
            true -> Loop(S#{waits := Ws#{P => {Who, Ref}}});
            false -> Who ! {Ref, ok}, Loop(S)
          end;
        calls -> Who ! {Ref, {Cs, length(Rs), length(Es)}}, Loop(S);
        alive -> Who ! {Ref, As}, Loop(S);
        known -> Who ! {Ref, Ks}, Loop(S);
        finish -> Who ! {Ref, {lists:reverse(Es), lists:sort(Rs), Ls}}
      end
  end
end,
Child = fun(Parent, Ref, Behaviour) ->
  process_flag(trap_exit, Behaviour =/= plain),
  Parent ! {Ref, ready},
  Live = fun Live() ->
    receive
      {crash, R} -> exit(R);
      {'EXIT', _, _} when Behaviour =:= stubborn -> Live();
      {'EXIT', _, R} ->
        case Behaviour of {polite, same} -> exit(R); {polite, Other} -> exit(Other) end
    end
  end,
  Live()
end,
Pick = fun(_, []) -> none; (N, All) -> lists:nth(N rem length(All) + 1, All) end,
Start = fun Start(Plan) ->
  #{key := Key, starts := Outcomes, behaviour := Behaviour} = Plan,
  Specify = fun(P) -> (maps:get(spec, P))#{start => {erlang, apply, [Start, [P]]}} end,
  Resolve = fun
    ({start_child, P}) -> {start_child, Specify(P)};
    ({start_simple, P}) -> {start_child, [[P]]};
    ({terminate_known, N}) -> {terminate_child, Pick(N, Ask(known))};
    ({get_known, N}) -> {get_childspec, Pick(N, Ask(known))};
    ({which_known, N}) -> {which_child, Pick(N, Ask(known))};
    (Other) -> Other
  end,
  Act = fun Act(Outcome) ->
    case Outcome of
      {call, Request, Then} -> Ask({issue, self(), Resolve(Request)}), Act(Then);
      {crash, N, R, Then} ->
        case Pick(N, Ask(alive)) of none -> ok; P -> P ! {crash, R}, Ask({await, P}) end,
        Act(Then);
      ignore -> ignore;
      {error, R} -> {error, R};
      {exit, R} -> exit(R);
      resolve -> Resolve;
      specify -> Specify;
      _ ->
        Ref = make_ref(), Me = self(),
        Pid = spawn_link(fun() -> Child(Me, Ref, Behaviour) end),
        receive {Ref, ready} -> ok end,
        Ask({started, Pid, Key}),
        case Outcome of ok -> {ok, Pid}; info -> {ok, Pid, info} end
    end
  end,
  case Outcomes of
    [Wanted] when Wanted =:= resolve; Wanted =:= specify -> Act(Wanted);
    _ ->
      K = Ask({attempt, Key}),
      Act(case K < length(Outcomes) of true -> lists:nth(K + 1, Outcomes); false -> ok end)
  end
end,
Tool = fun(Name) -> Start(#{key => 0, starts => [Name], behaviour => plain}) end,
Resolve = Tool(resolve),
Specify = Tool(specify),
Norm = fun
  Norm(Ls, T) when is_pid(T) -> maps:get(T, Ls, stranger);
  Norm(_, {erlang, apply, Args}) -> {mfa, is_list(Args)};
  Norm(Ls, T) when is_tuple(T) -> list_to_tuple(Norm(Ls, tuple_to_list(T)));
  Norm(Ls, T) when is_list(T) -> [Norm(Ls, X) || X <- T];
  Norm(Ls, T) when is_map(T) -> maps:map(fun(_, V) -> Norm(Ls, V) end, T);
  Norm(_, T) -> T
end,
Log = fun(E) -> collector ! {event, E} end,
Settle = fun Settle(Sup) ->
  Before = Ask(calls),
  case catch supervisor:which_children(Sup) of
    {'EXIT', _} -> receive {'EXIT', Sup, Why} -> Log({ended, Why}), dead end;
    Children ->
      {Made, Answered, _} = After = Ask(calls),
      Quiet = Before =:= After andalso Made =:= Answered,
      case Quiet andalso not lists:keymember(restarting, 2, Children) of
        true -> Log({settled, Children}), alive;
        false -> Settle(Sup)
      end
  end
end,
Perform = fun(Op, Sup) ->
  case Op of
    {crash, N, R} ->
      case Pick(N, Ask(alive)) of none -> ok; P -> P ! {crash, R}, Ask({await, P}) end;
    {kill, N} ->
      case Pick(N, Ask(alive)) of none -> ok; P -> exit(P, kill), Ask({await, P}) end;
    {stop, R} -> exit(Sup, R);
    {call, Request} ->
      try {reply, gen_server:call(Sup, Resolve(Request), infinity)}
      catch exit:{Why, _} -> {exit, Why} end
  end
end,
Drain = fun Drain() -> case Ask(calls) of {N, N, _} -> ok; _ -> erlang:yield(), Drain() end end,
Body = fun({Flags, Plans, Ops}) ->
  process_flag(trap_exit, true),
  register(collector, spawn_link(fun() ->
    Collect(#{events => [], labels => #{}, known => [], alive => [], tries => #{}, calls => 0,
              replies => [], waits => #{}})
  end)),
  Specs = case Flags of
    #{strategy := simple_one_for_one} ->
      [(maps:get(spec, P))#{start => {erlang, apply, [Start]}} || P <- Plans];
    _ -> [Specify(P) || P <- Plans]
  end,
  case supervisor:start_link(sup_identity, {ok, {Flags, Specs}}) of
    {error, Why} -> Log({not_started, Why});
    {ok, Sup} ->
      Go = fun
        Go(_, dead) -> ok;
        Go([], alive) -> ok;
        Go([Op | More], alive) ->
          Log(op),
          Answer = Perform(Op, Sup),
          State = Settle(Sup),
          % Not before: the supervisor goes on while its reply is under way.
          case Op of {call, _} -> Log(Answer); _ -> ok end,
          Go(More, State)
      end,
      Go(Ops ++ [{stop, shutdown}], Settle(Sup))
  end,
  Drain(),
  {Events, Replies, Labels} = Ask(finish),
  {Norm(Labels, Events), Norm(Labels, Replies)}
end,
Run = fun(Script) ->
  {_, Monitor} = spawn_monitor(fun() -> exit({result, Body(Script)}) end),
  receive {'DOWN', Monitor, process, _, {result, Result}} -> Result end
end,
{module, sup_identity} = code:load_binary(sup_identity, "sup_identity", Beam),
Filter = fun
  (#{msg := {report, #{label := {supervisor, Context}, report := Report}}}, _)
      when Context =/= progress ->
    {reason, Why} = lists:keyfind(reason, 1, Report),
    {offender, Offender} = lists:keyfind(offender, 1, Report),
    {id, Id} = lists:keyfind(id, 1, Offender),
    case whereis(collector) of
      undefined -> ok;
      C -> C ! {event, {report, Context, Why, Id, lists:keyfind(pid, 1, Offender)}}
    end,
    stop;
  (_, _) -> stop
end,
ok = logger:add_primary_filter(to_collector, {Filter, none}),
ready
"""


def identity_module(name: str) -> bytes:
    """A BEAM file of a module whose ``init/1`` returns its argument: there is no compiler here."""
    atoms = [name.encode(), b"init"]
    atom_chunk = struct.pack(">I", len(atoms)) + b"".join(bytes([len(a)]) + a for a in atoms)
    # label 1; func_info name, init, 1; label 2; return; int_code_end (argument = result = x0)
    code = bytes([1, 0x10, 2, 0x12, 0x22, 0x10, 1, 0x20, 19, 3])
    chunks = {
        b"AtU8": atom_chunk,
        b"Code": struct.pack(">IIIII", 16, 0, 178, 3, 1) + code,
        b"StrT": b"",
        b"ImpT": struct.pack(">I", 0),
        b"ExpT": struct.pack(">IIII", 1, 2, 1, 2),
    }
    body = b"BEAM"
    for tag, data in chunks.items():
        body += tag + struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)
    return b"FOR1" + struct.pack(">I", len(body)) + body


async def prepare(erl: Erl) -> None:
    """Define ``Run`` in a fresh emulator, which needs ``+S 1:1``."""
    await erl.eval(_DRIVER, Beam=identity_module("sup_identity"))


async def run_on_otp(erl: Erl, script: Term) -> Term:
    """The script's events in order, and the replies of the calls made during starts."""
    return await erl.eval("Run(Script)", Script=script)
