"""Names of the numbers that kernels read from tables: plain integers, so that compiled code is
kept between processes and fits every model."""

from __future__ import annotations

# dims: int64, one model's shard
(
    HIDDEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    HEAD_DIM,
    NUM_LAYERS,
    ROPE_DIM,
    USES_GELU,
    FINAL_NORM,
    IS_FIRST,  # has the embedding
    IS_LAST,  # has the output layer
    EMBEDDING_START,  # tokens whose embedding is here; others give zeros
    EMBEDDING_STOP,
    NUM_EXPERTS,  # routed; 0 where there are none
    NUM_ACTIVE,  # experts a token uses
    FIRST_EXPERT,  # of those whose weights are here
    NUM_EXPERTS_HERE,
    USES_SIGMOID,  # scores; else softmax
    NORMALIZES,  # chosen scores are divided by their sum
    NUM_GROUPS,
    NUM_ACTIVE_GROUPS,
    ADDS_TWO_BEST,  # a group's score; else its best
    EXPERTS_FUNCTION,  # address of machine code, see ``experts``
    NUM_DIMS,
) = range(23)

# reals: float32, one model
EPS, EMBEDDING_SCALE, ATTENTION_SCALE, ATTENTION_SOFTCAP, EXPERT_SCALE, NUM_REALS = range(6)

# matrices: int64 (some a layer, embedding and output layer, then those of experts; columns below);
# addresses in bytes. GATE, UP and DOWN of a layer with experts are those of the shared ones.
Q, K, V, O, GATE, UP, DOWN, ROUTER, MATRICES_A_LAYER = range(9)  # noqa: E741  # their names
EMBEDDING, OUTPUT, ENDS = range(3)  # behind the layers
EXPERT_GATE, EXPERT_UP, EXPERT_DOWN, MATRICES_AN_EXPERT = range(4)  # behind the ends
ADDRESS, KIND, TILES, GROUPS, BIAS, FUNCTION, NUM_COLUMNS = range(7)

# layers: int64 (one row a layer); addresses of float32 vectors, 0 where the model has none
(
    ATTENTION_NORM,
    ATTENTION_POST_NORM,
    MLP_NORM,
    MLP_POST_NORM,
    Q_NORM,
    K_NORM,
    ROPE,  # (context, 2, rope dim / 2): cosines, sines
    WINDOW,  # tokens seen; 0 for all
    EXPERTS,  # row of matrices where the layer's experts begin; 0 for none
    SCORE_BIAS,
    NUM_LAYER_COLUMNS,
) = range(11)

# step: int64, one call
(
    NUM_ROWS,
    NUM_RUNS,
    NUM_OUT,
    NUM_THREADS,
    COUNTERS,
    OPEN,  # a counter: parts that helper threads may begin; below 0, they leave
    EXITS,  # a counter: helper threads that left the step
    TOKENS,  # int64 (rows,)
    SLOTS,
    POSITIONS,
    RUN_STARTS,  # int64 (runs,): a run is at most RUN_ROWS consecutive rows of one sequence
    RUN_LENGTHS,
    OUT_ROWS,  # int64 (outputs,): rows whose logits are wanted
    RESIDUAL,  # activations, all float32 (groups, rows, 32)
    X,
    X_SUMS,  # float32 (groups, rows, 2)
    QUERIES,
    KEYS,
    VALUES,
    MIXED,  # what attention read, before the o projection
    MIXED_SUMS,
    INNER,  # the MLP's inner activations
    INNER_SUMS,
    ROUTED,  # the router's logits
    CHOSEN,  # int64 (rows, active): experts of each row, in order
    FACTORS,  # float32 (rows, active): what their outputs are multiplied by
    PAIRS,  # int64 (rows, active): place of each choice among those of the same expert, or -1
    PAIR_ROWS,  # int64 (pairs,): the row of each place
    PAIR_SPANS,  # int64 (pairs,): the span it is in; a span is all rows of one expert
    SPAN_EXPERTS,  # int64 (spans,): the expert, counted among those here
    SPAN_STARTS,  # int64 (spans + 1,): its first place; behind the last, the number of places
    NUM_SPANS,  # int64 (1,)
    PLACES,  # int64 (experts here,): scratch
    EXPERT_X,  # float32 (groups, rows of a span, 32), span by span: inputs, then outputs
    EXPERT_X_SUMS,
    EXPERT_INNER,
    EXPERT_INNER_SUMS,
    PARTIAL,  # a half's output, before it joins the residual
    LOGITS,  # float32 (vocab tiles, outputs, 32)
    SCRATCH,  # per thread, SCRATCH_BYTES each
    SCRATCH_BYTES,
    SCORES_TOKENS,  # scores a query has room for
    CACHE,
    PAGES,  # int64 (slots, pages a slot): see ``compute.page_table``
    PAGES_A_SLOT,
    PAGE_BYTES,
    NUM_STEP,
) = range(47)

RUN_ROWS = 8
PAGE_TOKENS = 64
MAX_ROWS = 256  # rows in one call of a kernel

# A step is parts: the embedding, two halves a layer, the end. A part is phases, numbered through.
ATTENTION_PHASES, MLP_PHASES, EMBED_PHASES, END_PHASES = 5, 10, 1, 2
PHASES_A_LAYER = ATTENTION_PHASES + MLP_PHASES
