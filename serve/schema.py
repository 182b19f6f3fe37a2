"""Requests and replies, as the OpenAPI document at /docs shows them.

A field that is not known is refused, since a mistyped one would silently do nothing. A vector is a list of
numbers, or base64 of little-endian float32, which is a quarter of the bytes.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from lvm.codec.ladder import Answer

STORY = [
    "The steam engine was first used to pump water out of mines.",
    "Thomas Newcomen built one in 1712 at a colliery near Dudley.",
    "James Watt saw that most of its heat was wasted in the cylinder.",
    "In 1769 he patented a separate condenser that stayed cold.",
    "With Matthew Boulton he then sold engines to mills and mines.",
]


PIECE = 32
"""Vectors in one piece of a reply of many."""

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}
"""Next line, line separator and paragraph separator as JSON escapes."""

VECTOR = base64.b64encode(np.full(768, 768**-0.5, "<f4").tobytes()).decode()
"""An example: a unit vector of `mini` or GTR as base64."""


class RefusedError(Exception):
    """A request that cannot be answered, with the status and the message of the reply."""

    def __init__(
        self, status: int, message: str, retry_after_s: int | None = None, param: str | None = None
    ) -> None:
        """param: the field that is wrong."""
        super().__init__(message)
        self.status, self.retry_after_s, self.param = status, retry_after_s, param


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Vector = Annotated[
    list[float] | str,
    Field(description="768 finite numbers, or base64 of as many little-endian float32."),
]
Deadline = Annotated[
    float | None,
    Field(
        gt=0,
        description="Seconds the whole request may take; afterwards it is dropped everywhere, status 408.",
    ),
]
UseCache = Annotated[bool, Field(description="False computes everything anew.")]
Steps = Annotated[
    int | None,
    Field(ge=0, description="Exactly this many corrector steps; none climbs the ladder 1, 3, 5."),
]
OneOrMany = Annotated[str | list[str], Field(description="One text, or several in one call.")]


class Milliseconds(_Reply):
    """Where the time went."""

    queue: float = Field(0, description="Waiting and travelling.")
    encode: float = 0
    context: float = 0
    predict: float = 0
    snap: float = Field(0, description="The search for neighbours included.")
    decode: float = 0
    total: float = 0


class ModelRecord(_Reply):
    """A loaded model."""

    name: str = Field(description="What a request calls it.")
    folder: str = Field(description="Its record, which names the very weights.")
    architecture: str
    parameters: int
    context: int = Field(
        description="Chunks it reads before the one it predicts; more are left out, oldest first."
    )
    created: str
    val_cosine: float | None = None
    codec: str = Field(description="Digest of the codec its vectors come from.")


class CodecRecord(_Reply):
    """The loaded codec's identity."""

    name: str
    digest: str
    encoder_sha256: str
    tokenizer_sha256: str
    pooling: str
    dense: bool
    normalized: bool
    max_tokens: int
    dim: int


class Neighbour(_Reply):
    """A corpus chunk near a vector."""

    text: str
    title: str
    source: str
    chunk_id: str
    position: int
    cosine: float
    tmd: list[str] | None = Field(None, description="Domain, task and modifier, where they are known.")


# ----------------------------------------------------------------------------------------------------- generate


class GenerateRequest(_Request):
    """Text, or chunks, to the predicted next text."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"chunks": STORY, "model": "lstm", "length": 2}]},
    )

    text: OneOrMany | None = Field(
        None, description="Cut into chunks here; of several, each is an input of its own."
    )
    chunks: list[str] | list[list[str]] | None = Field(
        None, description="Chunks in order, the latest last; or several such lists."
    )
    model: Name | None = Field(None, description="A name of /v1/models.")
    length: int = Field(1, ge=1, description="Chunks to write, each predicted from all before it.")
    stream: bool = Field(False, description="Server-sent events, one for each chunk as it is ready.")
    steps: Steps = None
    snap: bool = Field(
        False,
        description="Move the prediction onto the corpus before it is written. The writer needs it not.",
    )
    fill: Literal["retrieve", "repeat", "none"] = Field(
        "retrieve", description="How fewer than five chunks are completed."
    )
    neighbours: int = Field(0, ge=0, description="Nearest corpus chunks of each prediction to reply with.")
    smooth: bool = Field(False, description="Reword by the configured chat endpoint.")
    cache: UseCache = True
    deadline_s: Deadline = None


class ContextReply(_Reply):
    """What the predictor read."""

    mode: Literal["seq", "ann", "mixed", "repeat_pad", "passthrough"]
    texts: list[str]
    origins: list[Literal["text", "retrieved", "repeated"]]


class AttemptReply(_Reply):
    """A text that was refused."""

    text: str
    source: Literal["exact", "writer", "corpus"]
    steps: int
    cosine: float
    refusals: list[str] = Field(description="What speaks against it.")


SOURCE = Field(
    description="exact: read back, the vector is this text's own. writer: written by a language model from the vector. "
    "corpus: the nearest corpus chunk's own words."
)


class Generated(_Reply):
    """One predicted chunk."""

    text: str
    source: Literal["exact", "writer", "corpus"] = SOURCE
    steps: int = Field(description="Corrector steps of an exact text.")
    refusals: list[str] = Field(description="What speaks against the text, given for want of a better one.")
    attempts: list[AttemptReply] = Field(description="Texts that were refused before it, in order.")
    log_prob: float | None = Field(
        description="Mean natural log-probability per character under the language model; real text has about -1."
    )
    emergency: str | None = Field(None, description="Why the decoder was not asked at all.")
    cosine: float = Field(description="Of the text's vector with the prediction.")
    snapped_cosine: float = Field(description="Of the raw prediction with what was decoded after the snap.")
    drifted: bool = Field(description="Whether the snap used the blend for drift.")
    context: ContextReply
    cached: Literal["answer", "vector"] | None
    neighbours: list[Neighbour]
    smoothed_from: str | None = Field(None, description="The text before smoothing.")
    smoothing_error: str | None = None
    retries: int = Field(0, description="Calls sent again since a replica was lost.")
    milliseconds: Milliseconds


class GeneratedInput(_Reply):
    """All of one input."""

    chunks: list[str] = Field(description="The input as it was cut.")
    truncated: int = Field(
        description="Chunks of the context that were longer than the codec's limit, and were cut."
    )
    generated: list[Generated]
    text: str = Field(description="The generated chunks, joined.")


class GenerateReply(_Reply):
    """Of /v1/generate, one result an input, in order."""

    request_id: str
    model: ModelRecord
    codec: CodecRecord
    results: list[GeneratedInput]
    milliseconds: float


# ------------------------------------------------------------------------------------------- the single stages


class ChunkRequest(_Request):
    """Texts to chunks."""

    text: OneOrMany = Field(examples=[" ".join(STORY)])


class ChunkItem(_Reply):
    """A chunk."""

    position: int
    text: str
    num_tokens: int


class ChunkReply(_Reply):
    """Of /v1/chunk, one list a text."""

    request_id: str
    codec: CodecRecord
    results: list[list[ChunkItem]]
    milliseconds: float


class EncodeRequest(_Request):
    """Texts to vectors."""

    texts: OneOrMany = Field(examples=[STORY[:2]])
    encoding_format: Literal["float", "base64"] = "float"
    cache: UseCache = True
    deadline_s: Deadline = None


class EncodeReply(_Reply):
    """Of /v1/encode."""

    request_id: str
    codec: CodecRecord
    vectors: list[list[float]] | list[str]
    num_tokens: list[int]
    truncated: list[bool] = Field(
        description="True where a text was longer than the codec's limit, and was cut."
    )
    cached: list[bool] = Field(description="True where the vector was held from an earlier request.")
    milliseconds: Milliseconds


def _require_texts(given: Any) -> Any:
    """The input as it is. Raises PydanticCustomError, which says what to do, where it holds token ids."""
    first = given
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, int) and not isinstance(first, bool):
        raise PydanticCustomError(
            "token_ids",
            "token ids are not taken, since they are another tokenizer's; send texts. "
            "In LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)",
        )
    return given


class EmbeddingsRequest(_Request):
    """OpenAI's form. Fields that are not known are passed over and null is the default, as there."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Annotated[OneOrMany, BeforeValidator(_require_texts)] = Field(examples=[STORY[0]])
    model: Name | None = Field(
        None, description="The codec's name; by default the loaded one.", examples=["mini"]
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="By default float.")
    dimensions: int | None = Field(
        None, description="The codec's own, or left out: vectors are never shortened."
    )


class Embedding(_Reply):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(_Reply):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(_Reply):
    """OpenAI's form, and what every reply here says beside it."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Field(description="Tokens of the whole texts, those that were cut off included.")
    truncated: list[bool] = Field(
        description="One for each of `data`: true where the text was longer than the codec's limit "
        "(`codec.max_tokens`) and only its beginning is in the vector."
    )
    request_id: str
    codec: CodecRecord
    milliseconds: Milliseconds


class PredictRequest(_Request):
    """Context vectors to the next vector."""

    vectors: list[Vector] | None = Field(
        None, description="One context, oldest first.", examples=[[VECTOR, VECTOR]]
    )
    contexts: list[list[Vector]] | None = Field(None, description="Several contexts.")
    model: Name | None = None
    encoding_format: Literal["float", "base64"] = "float"
    deadline_s: Deadline = None


class PredictReply(_Reply):
    """Of /v1/predict, one vector a context."""

    request_id: str
    model: ModelRecord
    codec: CodecRecord
    vectors: list[list[float]] | list[str]
    milliseconds: Milliseconds


class DecodeRequest(_Request):
    """Vectors to text."""

    vectors: list[Vector] = Field(description="Of the loaded codec; scaled to norm 1.", examples=[[VECTOR]])
    steps: Steps = None
    codec: Name | None = Field(None, description="Refused where another codec is loaded.")
    subscribers: OneOrMany | None = Field(None, description="The original's name for codecs: jxe, ielab.")
    cache: UseCache = True
    deadline_s: Deadline = None


class DecodedText(_Reply):
    """One vector's text."""

    text: str
    source: Literal["exact", "writer", "corpus"] = SOURCE
    steps: int
    refusals: list[str]
    attempts: list[AttemptReply]
    log_prob: float | None
    emergency: str | None = None
    cosine: float
    cached: bool


class DecodeReply(_Reply):
    """Of /v1/decode, one result per vector."""

    request_id: str
    codec: CodecRecord
    results: list[DecodedText]
    milliseconds: Milliseconds


class SearchRequest(_Request):
    """Texts or vectors to the nearest chunks, of those that pass every filter."""

    query: OneOrMany | None = Field(None, examples=["steam engines in mines"])
    vectors: list[Vector] | None = None
    k: int = Field(10, ge=1)
    corpus: Literal["run", "store"] | None = Field(
        None, description="Chunks of --run, or of --dataset; by default of the dataset, where there is one."
    )
    domain: str | None = Field(
        None, description="Of the chunk's TMD code, by name.", examples=["Engineering"]
    )
    task: str | None = None
    modifier: str | None = None
    source: Name | None = Field(None, description="Equal to the chunk's source; of a dataset only.")
    contains: Name | None = Field(None, description="Somewhere in its text, in any case; of a dataset only.")
    deadline_s: Deadline = None


class SearchReply(_Reply):
    """Of /v1/search, one list a query, best first."""

    request_id: str
    codec: CodecRecord
    results: list[list[Neighbour]]
    milliseconds: Milliseconds


class TmdRequest(_Request):
    """Texts to their TMD codes."""

    texts: OneOrMany = Field(examples=[STORY[:1]])
    deadline_s: Deadline = None


class TmdCode(_Reply):
    """Domain, task and modifier of a text: the labels nearest to it in the codec's space."""

    code: int = Field(description="16 bits: domain in 15-12, task in 11-7, modifier in 6-1.")
    domain: str
    task: str
    modifier: str
    cosines: list[float] = Field(description="Of the text with each label's prototype.")
    confidence: float = Field(description="0 to 1: geometric mean of the three labels' shares in their axes.")
    features: list[int] = Field(description="The 16 bits, the highest first.")


class TmdReply(_Reply):
    """Of /v1/tmd, one code a text."""

    request_id: str
    codec: CodecRecord
    results: list[TmdCode]
    milliseconds: Milliseconds


class IngestArticle(_Request):
    """An article for the corpus."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    title: Annotated[str, StringConstraints(max_length=1000)] = ""
    text: str
    source: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "ingest"


class IngestRequest(_Request):
    """Articles for the concept store, or for the next `latent run`."""

    articles: list[IngestArticle] = Field(
        examples=[[{"id": "steam-1", "title": "Steam engines", "text": " ".join(STORY), "source": "notes"}]]
    )
    deadline_s: Deadline = None


class IngestChunk(_Reply):
    """A chunk, named as the chunk job will name it."""

    chunk_id: str
    position: int
    text: str
    num_tokens: int
    tmd: TmdCode


class IngestedArticle(_Reply):
    """What became of an article in the store."""

    id: str
    source: str
    status: Literal["stored", "known", "refused"] = Field(
        description="Stored now; there already with this content; or not storable, and `reason` says why."
    )
    chunks: int = Field(description="Stored now.")
    episodes: int = Field(description="Coherent runs of paragraphs among them.")
    reason: str = ""


class IngestReply(_Reply):
    """Of /v1/ingest: what became of each article in the dataset, or its chunks where they went to the inbox."""

    request_id: str
    codec: CodecRecord
    dataset: str | None = Field(None, description="Dataset of the concept store, where there is one.")
    articles: list[IngestedArticle] = []
    file: str | None = Field(None, description="File in the inbox; the same articles give the same file.")
    results: list[list[IngestChunk]] = []
    milliseconds: Milliseconds


class ModelReply(_Reply):
    """Of /v1/models/{id}, OpenAI's form: a predictor, or the codec, whose name /v1/embeddings takes."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time, seconds; 0 where it is not known.")
    owned_by: str = "latent"


class ModelsReply(_Reply):
    """Of /v1/models; `data` has OpenAI's form too."""

    object: Literal["list"] = "list"
    data: list[ModelReply]
    models: list[ModelRecord]
    default_model: str
    codec: CodecRecord
    decoder: dict[str, Any]
    corpus: dict[str, Any]
    limits: dict[str, Any]
    smoothing: bool


class HealthReply(_Reply):
    """Of /health."""

    status: Literal["ready", "degraded", "not ready"]
    reasons: list[str] = Field(description="Which target is missed, or what is not there.")
    targets: dict[str, float]
    figures: dict[str, float | int]
    breaker: dict[str, Any]
    replicas: dict[str, int] = Field(description="Running replicas of each deployment.")
    pending: int


class ErrorDetail(_Reply):
    """What was expected, what came, what to do."""

    message: str
    type: str
    param: str | None = Field(None, description="The field that is wrong.")
    code: int | str | None = Field(description="The status; on OpenAI's routes a word or null, as there.")
    request_id: str


class ErrorReply(_Reply):
    """Of every status from 400."""

    error: ErrorDetail


# ------------------------------------------------------------------------------------------------- conversions


def pack(vector: NDArray[np.float32], form: str) -> Any:
    """A vector for a reply: a list, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def embeddings_json(
    reply: EmbeddingsReply, vectors: Sequence[NDArray[np.float32]], form: str
) -> Iterator[str]:
    """The JSON of `reply` with these vectors as its data, piece by piece: 2,048 lists of numbers at once would take a
    hundred megabytes."""
    rest = reply.model_dump_json(exclude={"object", "data"})
    for start in range(0, len(vectors), PIECE):
        part = [
            Embedding(index=i, embedding=pack(vector, form)).model_dump()
            for i, vector in enumerate(vectors[start : start + PIECE], start)
        ]
        opening = ", " if start else '{"object": "list", "data": ['
        closing = "], " + rest[1:] if start + PIECE >= len(vectors) else ""
        yield opening + json.dumps(part)[1:-1] + closing


def event(name: str, data: dict[str, Any]) -> str:
    """A server-sent event. JSON escapes the line ends of ASCII; those of Unicode are escaped here, since clients that
    read by `str.splitlines` would cut an event in two."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False).translate(LINE_ENDS)}\n\n"


def unpack(vectors: list[list[float] | str], dim: int, what: str) -> NDArray[np.float32]:
    """Unit vectors (N, dim) of a request. Raises RefusedError naming the first that is none."""
    rows = np.empty((len(vectors), dim), np.float32)
    for i, vector in enumerate(vectors):
        if isinstance(vector, str):
            try:
                raw = base64.b64decode(vector, validate=True)
            except (binascii.Error, ValueError) as err:
                raise RefusedError(
                    422, f"{what}[{i}] is no base64 ({err}); send 768 numbers or base64 float32"
                ) from err
            if len(raw) != 4 * dim:
                raise RefusedError(
                    422,
                    f"{what}[{i}] holds {len(raw)} bytes, expected {4 * dim}: {dim} little-endian float32",
                )
            rows[i] = np.frombuffer(raw, "<f4")
        else:
            if len(vector) != dim:
                raise RefusedError(422, f"{what}[{i}] has {len(vector)} numbers, expected {dim}")
            with np.errstate(over="ignore"):
                rows[i] = vector
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms < 1e-12))
    if bad.size:
        raise RefusedError(
            422,
            f"{what}[{bad[0]}] is all zero or holds NaN, infinity or a number beyond float32; expected finite numbers",
        )
    return (rows / norms[:, None]).astype(np.float32)


def decoded_text(answer: Answer) -> DecodedText:
    """A ladder's answer as a reply."""
    return DecodedText(
        text=answer.text,
        cosine=round(answer.cosine, 6),
        cached=answer.cached,
        **came_about(answer),
    )


def came_about(answer: Answer) -> dict[str, Any]:
    """The fields of a reply that say where a text comes from."""
    return {
        "source": answer.source,
        "steps": answer.steps,
        "refusals": list(answer.refusals),
        "attempts": [
            AttemptReply(
                text=a.text,
                source=a.source,
                steps=a.steps,
                cosine=round(a.cosine, 6),
                refusals=list(a.refusals),
            )
            for a in answer.attempts
        ],
        "log_prob": None if answer.log_prob is None else round(answer.log_prob, 4),
        "emergency": answer.emergency,
    }
