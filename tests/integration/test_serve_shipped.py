"""`latent serve` before anything was trained: the predictors that ship, and no corpus."""

from collections.abc import Iterator

import pytest

from lvm.predict.predictor import SHIPPED
from lvm.predict.record import read_aliases
from tests.integration import browser
from tests.integration.serving import Service, running

TEXT = "The steam engine was first used to pump water out of mines. James Watt added a separate condenser in 1765."


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(None) as service:
        yield service


def test_the_shipped_predictors_answer_and_say_that_there_is_no_corpus(service: Service) -> None:
    known = service.get("/v1/models").json
    assert [m["name"] for m in known["models"]] == [*read_aliases(SHIPPED), "passthrough"]
    assert (known["default_model"], known["corpus"]) == ("gru", {})
    reply = service.post("/v1/generate", {"text": TEXT, "length": 2})
    assert reply.status == 200, reply.body
    first, second = reply.json["results"][0]["generated"]
    # Two chunks of a context of five: the first is repeated, nothing is retrieved.
    assert first["context"]["mode"] == "repeat_pad"
    assert first["source"] in ("writer", "exact")
    assert first["text"]
    assert second["context"]["texts"][-1] == first["text"]
    encoded = service.post("/v1/encode", {"texts": [TEXT[:59]]}).json["vectors"]
    decoded = service.post("/v1/decode", {"vectors": encoded}).json["results"][0]
    assert (decoded["text"], decoded["source"]) == (TEXT[:59], "exact")
    assert service.get("/health").json["status"] == "ready"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/search", {"query": "steam"}, "search"),
        ("/v1/generate", {"text": TEXT, "snap": True}, "snap"),
        ("/v1/generate", {"text": TEXT, "neighbours": 2}, "neighbours"),
    ],
)
def test_what_needs_a_corpus_is_refused_with_what_to_do(
    service: Service, path: str, body: dict[str, object], field: str
) -> None:
    reply = service.post(path, body)
    assert reply.status == 422
    assert reply.json["error"]["message"] == (
        f"{field} needs a corpus, and no corpus is loaded; start the service with --run, the folder of a `latent run`"
    )


@pytest.mark.skipif(browser.found() is None, reason="needs chromium on the PATH (apt-get install chromium)")
def test_the_page_offers_nothing_that_needs_a_corpus(service: Service) -> None:
    with browser.browser() as page:
        page.open(service.url)
        page.wait("document.getElementById('codec').textContent.includes('no corpus')")
        assert page.run(
            "document.getElementById('snap-row').hidden && document.getElementById('fill').value"
        ) == ("repeat")
        page.run("document.getElementById('text').focus()")
        page.write(TEXT)
        page.key("Enter", 13, modifiers=2)
        page.wait("document.querySelectorAll('.step').length === 1 && document.getElementById('stop').hidden")
        assert len(page.run("document.querySelector('.words').textContent")) > 3
        assert page.run("document.querySelector('.near').hidden")
        assert page.messages == []
