"""What `wasat export --web` writes, in a real browser: Debian's Chromium, its own software adapter, driven by Playwright."""

from __future__ import annotations

import functools
import http.server
import io
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from wasat.runtime.sampling import Sampler, SamplingOptions
from wasat.runtime.tokenizer import Tokenizer
from wasat.runtime.web import HERE, TOKENIZERS, fetched

import wasat as ws

pytestmark = pytest.mark.machines
ROOT = Path(__file__).resolve().parents[2]
MEDIA = ROOT / "examples" / "media"
WEBGPU = [
    "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader", "--use-webgpu-adapter=swiftshader",
]  # fmt: skip


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map: ClassVar = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *args: Any) -> None: ...


def served(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """A server of ``folder``, and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[[list[str]], Any]]:
    """Starts Chromium with further flags."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("not installed: chromium")
    api = pytest.importorskip("playwright.sync_api", reason="not installed: playwright (pip install playwright)")
    with api.sync_playwright() as p:
        yield lambda flags: p.chromium.launch(executable_path=path, args=["--headless=new", "--no-sandbox", *flags])


@pytest.fixture(scope="module")
def browser(launch: Callable[[list[str]], Any]) -> Iterator[Any]:
    made = launch(WEBGPU)
    yield made
    made.close()


@pytest.fixture(scope="module")
def modules(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An empty page that may import the host's modules."""
    if not fetched():
        pytest.skip("not here: the JavaScript of tokenizers (python -m wasat.runtime.web.fetch)")
    folder = tmp_path_factory.mktemp("modules")
    for path in [*HERE.glob("*.js"), *(HERE / name for name in TOKENIZERS)]:
        shutil.copy(path, folder)
    (folder / "empty.html").write_text("<!doctype html>")
    server, address = served(folder)
    page = browser.new_page()
    page.goto(f"{address}/empty.html")
    yield page
    server.shutdown()


OPTIONS = [
    {"temperature": 0.8, "seed": 3}, {"temperature": 1.3, "top_k": 5, "seed": 2**40 + 5}, {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 1.4}, {"repetition_penalty": 1.7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "min_p": 0.05, "repetition_penalty": 0.8, "seed": 9},
]  # fmt: skip
NAMES = {"top_k": "topK", "top_p": "topP", "min_p": "minP", "repetition_penalty": "repetitionPenalty"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_drawn_as_in_python(modules: Any, options: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32) * 3
    logits[5, :] = 1.0  # ties
    sampler = Sampler(SamplingOptions(**options), 0, [1, 2])
    expected = [sampler.sample(x) for x in logits]
    found = modules.evaluate(
        """async ([rows, options]) => {
            const { Sampler } = await import("./sampling.js");
            const sampler = new Sampler(options, [1, 2]);
            return rows.map((x) => sampler.sample(Float32Array.from(x)));
        }""",
        [logits.tolist(), {NAMES.get(k, k): x for k, x in options.items()}],
    )
    assert found == expected


@pytest.mark.parametrize("storage", ["uint16", "uint32"])
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_floats_of_16_bits(modules: Any, kind: Any, storage: str) -> None:
    """All there are, read; numbers given, among them halves between two, the largest and the smallest, rounded as in Python."""
    name, every = np.dtype(kind).name, np.arange(2**16, dtype=np.uint16)
    numbers = every.view(kind).astype(np.float32)
    finite = np.sort(numbers[np.isfinite(numbers)])
    with np.errstate(over="ignore"):
        between = np.concatenate([(finite[1:] + finite[:-1]) / 2, finite * np.float32(1.0001), [3e38, -1e-45, 65520, np.inf]])
        wanted = between.astype(np.float32).astype(kind)
    found, read = modules.evaluate(
        """async ([name, storage, numbers, bits]) => {
            const { Memory } = await import("./plan.js");
            let written = null;
            const device = { allocate: (bytes) => ({ bytes }), write: (buffer, data) => { written = data; } };
            const Stored = storage === "uint32" ? Uint32Array : Uint16Array;
            const memory = new Memory(device, { [name]: storage });
            memory.of(numbers, name, [numbers.length]);
            const given = new Uint8Array(Stored.from(bits).buffer);
            const read = memory.loaded(given, name, bits.length);
            return [[...new Stored(written.buffer, 0, numbers.length)], [...read].map(String)];
        }""",
        [name, storage, between.tolist(), every.tolist()],
    )
    np.testing.assert_array_equal(np.array(found, np.uint16), wanted.view(np.uint16))
    np.testing.assert_array_equal(np.array(read, np.float32), numbers)


TEXTS = (
    "def ", "Hello", " ", "\n", "\t", "  ", "é", "ß", "漢字", "🙂", "👩\u200d👩\u200d👧", "3.14", "'s",
    "<end>", "<0x41>", "\u0301", "ﬁ", "A" * 20,
)  # fmt: skip


@pytest.mark.parametrize("model", ["pygemma", "gemini"])
def test_text_is_split_and_joined_as_in_python(modules: Any, model: str) -> None:
    path = ROOT / "examples" / model / "tokenizer.json"
    rng, tokenizer = random.Random(0), Tokenizer(path)
    texts = ["".join(rng.choices(TEXTS, k=rng.randrange(12))) for _ in range(300)]
    ids = [[rng.randrange(tokenizer.library.get_vocab_size()) for _ in range(rng.randint(1, 12))] for _ in range(300)]

    def streamed(tokens: list[int]) -> list[str]:
        stream = tokenizer.stream(tokens[: len(tokens) // 2])
        return [*map(stream.push, tokens[len(tokens) // 2 :]), stream.flush()]

    found = modules.evaluate(
        """async ([json, texts, ids]) => {
            const { Tokenizer } = await import("./text.js");
            const t = new Tokenizer(json);
            const streamed = (tokens) => {
                const half = tokens.length >> 1, stream = t.stream(tokens.slice(0, half));
                return [...tokens.slice(half).map((x) => stream.push(x)), stream.flush()];
            };
            return [texts.map((x) => t.encode(x)), ids.map((x) => t.decode(x)), ids.map(streamed)];
        }""",
        [json.loads(path.read_text()), texts, ids],
    )
    assert found == [[tokenizer.encode(x) for x in texts], [tokenizer.decode(x) for x in ids], [streamed(x) for x in ids]]


def test_a_sound_that_is_cut_off_is_refused(modules: Any) -> None:
    said = modules.evaluate(
        """async (bytes) => {
            const { arraysOf } = await import("./media.js");
            const file = new File([Uint8Array.from(bytes)], "half.wav");
            return arraysOf(file, [{ kind: "audio", rate: 8000 }]).catch((e) => e.message);
        }""",
        list((MEDIA / "word.wav").read_bytes()[:9000]),
    )
    assert said == "it is cut off: it has 9000 bytes of 16044"


@pytest.mark.parametrize("name", ["word.wav", "heard.wav"])
def test_samples_are_those_of_the_file(modules: Any, name: str) -> None:
    found = modules.evaluate(
        """async (bytes) => {
            const { arraysOf } = await import("./media.js");
            const { inputs } = await arraysOf(new File([Uint8Array.from(bytes)], "a.wav"), [{ kind: "audio", rate: 8000 }]);
            return Array.from(inputs.audio.data);
        }""",
        list((MEDIA / name).read_bytes()),
    )
    assert np.array_equal(np.array(found, np.float32), ws.runtime.Audio(MEDIA / name).samples(8000))


# -- the page --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wasat.web import export_web

    if not fetched():
        pytest.skip("not here: the JavaScript of tokenizers (python -m wasat.runtime.web.fetch)")
    out = tmp_path_factory.mktemp("web") / "gemini"
    export_web(ws.from_pretrained(ROOT / "examples" / "gemini"), out, shard=1 << 20)
    return out


def opened(browser: Any, address: str) -> Any:
    """The page, when the model is there or it has said why not."""
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.wait_for_function("!!globalThis.wasat || !document.getElementById('failed').hidden", timeout=600_000)
    return page


@pytest.fixture(scope="module")
def page(browser: Any, folder: Path) -> Iterator[Any]:
    server, address = served(folder)
    made = opened(browser, address)
    assert made.inner_text("#failed") == ""
    yield made
    server.shutdown()


QUESTIONS = json.loads((MEDIA / "questions.json").read_text())


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model, compiled for this machine's processor in f32: its tokens are the interpreter's (test_gemini_compiled)."""
    out = tmp_path_factory.mktemp("python") / "gemini.wasat"
    ws.compile(ws.from_pretrained(ROOT / "examples" / "gemini"), out)
    return ws.load(out)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q["title"])
def test_the_demo_s_questions_are_answered_as_in_python(page: Any, python: Any, question: dict[str, Any]) -> None:
    media = [MEDIA / name for name in question["media"]]
    (expected,) = python.generate([[*media, question["question"]]], max_tokens=32)
    before = page.locator(".turn").count()
    if media:
        page.set_input_files("#file", [str(p) for p in media])
    page.fill("#prompt", question["question"])
    page.evaluate("document.getElementById('maxTokens').value = 32")
    page.click("#send")
    page.wait_for_function(f"document.querySelectorAll('.turn')[{before}]?.dataset.done", timeout=600_000)
    turn = page.locator(".turn").nth(before)
    assert turn.locator(".error").count() == 0, turn.inner_text()
    tokens = [int(t) for t in (turn.get_attribute("data-tokens") or "").split(",") if t]
    if question["media"] == ["mover.mp4"]:  # decoded by the browser: the answer, not each number, is the same
        assert turn.locator(".said").inner_text().strip() == expected.text.strip()
    else:
        assert tokens == expected.tokens


@pytest.mark.parametrize("name", ["scene.png", "picture.png", "digit.png"])
def test_pictures_are_those_of_the_file(page: Any, name: str) -> None:
    found = page.evaluate(
        """async (bytes) => {
            const { arraysOf } = await import("./media.js");
            const file = new File([Uint8Array.from(bytes)], "a.png", { type: "image/png" });
            return Array.from((await arraysOf(file, [{ kind: "image" }], wasat.host.device)).inputs.image.data);
        }""",
        list((MEDIA / name).read_bytes()),
    )
    assert found == ws.runtime.Image(MEDIA / name).pixels().ravel().tolist()


@pytest.mark.parametrize("subsampling, most, mean", [(0, 4, 1.0), (2, 60, 2.0)])
def test_jpegs_are_near_what_python_reads(page: Any, subsampling: int, most: int, mean: float) -> None:
    """Decoders differ in how they round, and in how they bring colours of half the size up."""
    from PIL import Image as Pillow

    made = io.BytesIO()
    Pillow.open(MEDIA / "picture.png").convert("RGB").save(made, "JPEG", quality=90, subsampling=subsampling)
    found = page.evaluate(
        """async (bytes) => {
            const { arraysOf } = await import("./media.js");
            const file = new File([Uint8Array.from(bytes)], "a.jpg", { type: "image/jpeg" });
            return Array.from((await arraysOf(file, [{ kind: "image" }], wasat.host.device)).inputs.image.data);
        }""",
        list(made.getvalue()),
    )
    expected = ws.runtime.Image(made.getvalue()).pixels()
    away = np.abs(np.array(found).reshape(expected.shape) - expected)
    assert away.max() <= most
    assert away.mean() <= mean


def test_resampled_sound_is_near_what_python_hears(modules: Any) -> None:
    found = modules.evaluate(
        """async (bytes) => {
            const { arraysOf } = await import("./media.js");
            const { inputs } = await arraysOf(new File([Uint8Array.from(bytes)], "a.wav"), [{ kind: "audio", rate: 16000 }]);
            return Array.from(inputs.audio.data);
        }""",
        list((MEDIA / "word.wav").read_bytes()),
    )
    expected = ws.runtime.Audio(MEDIA / "word.wav").samples(16000)
    assert abs(len(found) - len(expected)) <= 2
    n = min(len(found), len(expected))
    away = np.array(found[:n]) - expected[:n]
    assert np.sqrt(np.mean(away**2)) <= 0.05 * np.sqrt(np.mean(expected**2))


def test_weights_that_are_damaged_are_named(browser: Any, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    path = copy / "weights-0001.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    server, address = served(copy)
    page = opened(browser, address)
    assert page.inner_text("#failed").startswith("weights-0001.bin is not the file that was exported (its SHA-256 differs)")
    server.shutdown()


def test_a_browser_without_webgpu_is_told(launch: Callable[[list[str]], Any], folder: Path) -> None:
    server, address = served(folder)
    browser = launch(["--disable-features=WebGPU", "--disable-gpu"])
    assert "WebGPU" in opened(browser, address).inner_text("#failed")
    browser.close()
    server.shutdown()
