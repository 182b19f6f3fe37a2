"""Request and reply models; /openapi.json is generated from them.

Unknown fields are rejected, as a mistyped one would otherwise be ignored. A vector is a list of numbers, or base64 of
little-endian float32, which takes a quarter of the bytes.
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
"""Example input."""

PIECE = 32
"""Vectors per piece of a streamed reply."""

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}
"""Next line, line separator and paragraph separator as JSON escapes."""

VECTOR = base64.b64encode(np.full(768, 768**-0.5, "<f4").tobytes()).decode()
"""Example of a unit vector of `mini` or GTR as base64."""


class RefusedError(Exception):
    """An invalid request, with the status and message of the reply."""

    def __init__(
        self, status: int, message: str, retry_after_s: int | None = None, param: str | None = None
    ) -> None:
        """param: the invalid field."""
        super().__init__(message)
        self.status, self.retry_after_s, self.param = status, retry_after_s, param


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Vector = Annotated[
    list[float] | str,
    Field(description="Finite numbers, as many as the codec has (768), or base64 of little-endian float32."),
]
Deadline = Annotated[
    float | None,
    Field(
        gt=0,
        description="Time limit of the whole request, seconds; then it is cancelled in all stages, status 408.",
    ),
]
UseCache = Annotated[bool, Field(description="False bypasses the caches.")]
Steps = Annotated[
    int | None,
    Field(ge=0, description="Exact number of corrector steps; by default 1, 3 and 5 are tried in turn."),
]
OneOrMany = Annotated[str | list[str], Field(description="One text, or several in one call.")]


class Milliseconds(_Reply):
    """Milliseconds by stage."""

    queue: float = Field(0, description="Waiting and in transit.")
    encode: float = 0
    context: float = 0
    predict: float = 0
    snap: float = Field(0, description="Includes the search for neighbours.")
    decode: float = 0
    total: float = 0


class ModelRecord(_Reply):
    """A loaded model."""

    name: str = Field(description="The name to use in requests.")
    folder: str = Field(description="Folder of its record, which identifies the weights.")
    architecture: str
    parameters: int
    context: int = Field(description="Number of chunks it reads: the last ones of a longer input.")
    created: str
    val_cosine: float | None = None
    codec: str = Field(description="Digest of the codec whose vectors it predicts.")


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


class _CodecReply(_Reply):
    request_id: str
    codec: CodecRecord


class Neighbour(_Reply):
    """A corpus chunk near a vector."""

    text: str
    title: str
    source: str
    chunk_id: str
    position: int
    cosine: float
    tmd: list[str] | None = Field(None, description="Domain, task and modifier, if known.")


# ----------------------------------------------------------------------------------------------------- generate


class GenerateRequest(_Request):
    """Text, or chunks, to the predicted next text."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"chunks": STORY, "length": 2}]},
    )

    text: OneOrMany | None = Field(
        None, description="A text to split into chunks, or several texts, each a separate input."
    )
    chunks: list[str] | list[list[str]] | None = Field(
        None, description="Chunks in reading order, or several such lists, each a separate input."
    )
    model: Name | None = Field(None, description="A name of /v1/models.")
    length: int = Field(1, ge=1, description="Number of chunks to generate, one after another.")
    stream: bool = Field(False, description="Reply with server-sent events, one per chunk when it is ready.")
    steps: Steps = None
    snap: bool = Field(
        False,
        description="Move the prediction towards its nearest corpus vectors before decoding. Not needed with a writer.",
    )
    fill: Literal["retrieve", "repeat", "none"] = Field(
        "retrieve", description="How to fill up a context that is shorter than the model's context length."
    )
    neighbours: int = Field(
        0, ge=0, description="Number of nearest corpus chunks to return for each prediction."
    )
    smooth: bool = Field(False, description="Reword the text with the configured chat endpoint.")
    cache: UseCache = True
    deadline_s: Deadline = None


class ContextReply(_Reply):
    """The predictor's context."""

    mode: Literal["seq", "ann", "mixed", "repeat_pad", "passthrough"] = Field(
        description="Origin of the context: the request's chunks, chunks retrieved from the corpus, both, the "
        "request's repeated until there are enough, or unchanged."
    )
    texts: list[str]
    origins: list[Literal["text", "retrieved", "repeated"]]


class AttemptReply(_Reply):
    """A refused text."""

    text: str
    source: Literal["exact", "writer", "corpus"]
    steps: int
    cosine: float
    refusals: list[str] = Field(description="Why it was refused.")


SOURCE = Field(
    description="exact: inverted, the text encodes back to the vector. writer: written by a language model from the "
    "vector. corpus: the text of the nearest corpus chunk."
)


class Generated(_Reply):
    """One predicted chunk."""

    text: str
    source: Literal["exact", "writer", "corpus"] = SOURCE
    steps: int = Field(description="Corrector steps of an exact text.")
    refusals: list[str] = Field(
        description="Why this text was refused; empty unless no better one was found."
    )
    attempts: list[AttemptReply] = Field(description="Texts refused before this one, in order.")
    log_prob: float | None = Field(
        description="Mean natural log-probability per character under the language model; about -1 for real text."
    )
    emergency: str | None = Field(None, description="Why the decoder was bypassed, if it was.")
    cosine: float = Field(description="Cosine of the text's vector to the decoded one.")
    snapped_cosine: float = Field(description="Cosine of the raw prediction to the snapped vector.")
    drifted: bool = Field(description="Whether the snap used its weights for drifted predictions.")
    context: ContextReply
    cached: Literal["answer", "vector"] | None
    neighbours: list[Neighbour]
    smoothed_from: str | None = Field(None, description="The text before smoothing.")
    smoothing_error: str | None = None
    retries: int = Field(0, description="Calls resent because a replica was lost.")
    milliseconds: Milliseconds


class GeneratedInput(_Reply):
    """Everything generated for one input."""

    chunks: list[str] = Field(description="The input's chunks.")
    truncated: int = Field(
        description="Number of context chunks that exceeded the codec's limit and were truncated."
    )
    generated: list[Generated]
    text: str = Field(description="The generated chunks, joined.")


class GenerateReply(_Reply):
    """Reply of /v1/generate, one result per input, in order."""

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
    """One chunk."""

    position: int
    text: str
    num_tokens: int


class ChunkReply(_CodecReply):
    """Reply of /v1/chunk, one list per text."""

    results: list[list[ChunkItem]]
    milliseconds: float


class EncodeRequest(_Request):
    """Texts to vectors."""

    texts: OneOrMany = Field(examples=[STORY[:2]])
    encoding_format: Literal["float", "base64"] = "float"
    cache: UseCache = True
    deadline_s: Deadline = None


class EncodeReply(_CodecReply):
    """Reply of /v1/encode."""

    vectors: list[list[float]] | list[str]
    num_tokens: list[int]
    truncated: list[bool] = Field(
        description="True for texts that exceeded the codec's limit and were truncated."
    )
    cached: list[bool] = Field(description="True for vectors from the cache.")
    milliseconds: Milliseconds


def _require_texts(given: Any) -> Any:
    """The input, unchanged. Raises PydanticCustomError, with advice, if it holds token ids."""
    first = given
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, int) and not isinstance(first, bool):
        raise PydanticCustomError(
            "token_ids",
            "token ids are not supported, as they belong to another tokenizer; send texts. "
            "In LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)",
        )
    return given


class EmbeddingsRequest(_Request):
    """OpenAI's format: unknown fields are ignored, and null means the default."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Annotated[OneOrMany, BeforeValidator(_require_texts)] = Field(examples=[STORY[0]])
    model: Name | None = Field(
        None, description="The codec's name; by default the loaded one.", examples=["mini"]
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="By default float.")
    dimensions: int | None = Field(
        None, description="The codec's dimension, or omitted: vectors cannot be shortened."
    )


class Embedding(_Reply):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(_Reply):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(_Reply):
    """OpenAI's format, plus fields that all replies of this service have."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Field(description="Tokens of the texts before truncation.")
    truncated: list[bool] = Field(
        description="One value per entry of `data`: true if the text exceeded the codec's limit (`codec.max_tokens`) "
        "and only its beginning was encoded."
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
    """Reply of /v1/predict, one vector per context."""

    request_id: str
    model: ModelRecord
    codec: CodecRecord
    vectors: list[list[float]] | list[str]
    milliseconds: Milliseconds


class DecodeRequest(_Request):
    """Vectors to text."""

    vectors: list[Vector] = Field(
        description="Vectors of the loaded codec; they are scaled to norm 1.", examples=[[VECTOR]]
    )
    steps: Steps = None
    codec: Name | None = Field(None, description="The vectors' codec; must be the loaded one.")
    subscribers: OneOrMany | None = Field(
        None, description="Codecs as named by the original system's API: jxe, ielab."
    )
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


class DecodeReply(_CodecReply):
    """Reply of /v1/decode, one result per vector."""

    results: list[DecodedText]
    milliseconds: Milliseconds


class SearchRequest(_Request):
    """Texts or vectors to the nearest chunks that pass all filters."""

    query: OneOrMany | None = Field(None, examples=["steam engines in mines"])
    vectors: list[Vector] | None = None
    k: int = Field(10, ge=1)
    corpus: Literal["run", "store"] | None = Field(
        None,
        description="run: the chunks of --run; store: those of --dataset. Default: store, if there is a dataset.",
    )
    domain: str | None = Field(
        None, description="Filter by the domain of the chunk's TMD code.", examples=["Engineering"]
    )
    task: str | None = None
    modifier: str | None = None
    source: Name | None = Field(None, description="Filter by the chunk's source; datasets only.")
    contains: Name | None = Field(
        None, description="Filter by a substring of the text, case-insensitive; datasets only."
    )
    deadline_s: Deadline = None


class SearchReply(_CodecReply):
    """Reply of /v1/search, one list per query, best first."""

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
    cosines: list[float] = Field(description="Cosine of the text to each label's prototype.")
    confidence: float = Field(description="0 to 1: geometric mean of the three labels' shares on their axes.")
    features: list[int] = Field(description="The 16 bits, highest first.")


class TmdReply(_CodecReply):
    """Reply of /v1/tmd, one code per text."""

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
    """A chunk, with the id that it will get from the chunk job."""

    chunk_id: str
    position: int
    text: str
    num_tokens: int
    tmd: TmdCode


class IngestedArticle(_Reply):
    """Result for one article in the store."""

    id: str
    source: str
    status: Literal["stored", "known", "refused"] = Field(
        description="stored: newly stored; known: already stored with this content; refused: see `reason`."
    )
    chunks: int = Field(description="Newly stored chunks.")
    episodes: int = Field(description="Coherent runs of paragraphs among them.")
    reason: str = ""


class IngestReply(_CodecReply):
    """Reply of /v1/ingest: a result for each article in the dataset, or its chunks if it went to the inbox."""

    dataset: str | None = Field(None, description="Dataset of the concept store, if there is one.")
    articles: list[IngestedArticle] = []
    file: str | None = Field(None, description="File in the inbox; the same articles give the same file.")
    results: list[list[IngestChunk]] = []
    milliseconds: Milliseconds


class ModelReply(_Reply):
    """Reply of /v1/models/{id} in OpenAI's format: a predictor, or the codec, which is the model of /v1/embeddings."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time, seconds; 0 if unknown.")
    owned_by: str = "latent"


class ModelsReply(_Reply):
    """Reply of /v1/models; `data` is in OpenAI's format."""

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
    """Reply of /health."""

    status: Literal["ready", "degraded", "not ready"]
    release: str = Field(description="Name of the current release, as in the configuration.")
    reasons: list[str] = Field(description="Missed targets and missing replicas.")
    targets: dict[str, float]
    figures: dict[str, float | int]
    breaker: dict[str, Any]
    replicas: dict[str, int] = Field(description="Running replicas of each deployment.")
    pending: int


class ErrorDetail(_Reply):
    """An error; `message` says what was expected, what was received and what to do."""

    message: str
    type: str
    param: str | None = Field(None, description="The invalid field.")
    code: int | str | None = Field(description="The status; on OpenAI's routes a string or null.")
    request_id: str


class ErrorReply(_Reply):
    """Reply of every status of 400 or more."""

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
    """The JSON of `reply` with these vectors as `data`, in pieces, as 2,048 lists of numbers would take 100 MB."""
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
    """A server-sent event. Unicode's line ends, which JSON does not escape, are escaped for clients that split lines at
    them, as `str.splitlines` does."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False).translate(LINE_ENDS)}\n\n"


def unpack(vectors: list[list[float] | str], dim: int, what: str) -> NDArray[np.float32]:
    """A request's vectors, scaled to norm 1, (N, dim) float32. Raises RefusedError that names the first invalid one."""
    rows = np.empty((len(vectors), dim), np.float32)
    for i, vector in enumerate(vectors):
        if isinstance(vector, str):
            try:
                raw = base64.b64decode(vector, validate=True)
            except (binascii.Error, ValueError) as err:
                raise RefusedError(
                    422, f"{what}[{i}] is not base64 ({err}); send {dim} numbers or base64 float32"
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
        text=answer.text, cosine=round(answer.cosine, 6), cached=answer.cached, **provenance(answer)
    )


def provenance(answer: Answer) -> dict[str, Any]:
    """The reply fields that describe where a text comes from."""
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
