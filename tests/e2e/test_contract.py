"""The wire contract, field by field."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pictures import ROUNDING, difference, open_png, pixels_of, png_of
from tests.e2e.server import CANARY, ONE_STEP, SMALL, Server

DEFAULTS = {
    "user_id": "default",
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "width": 512,
    "height": 512,
    "num_images": 1,
    "reproducible": False,
}
CONTRACT = {"/health": {"get"}, "/generate": {"post"}, "/generate/image": {"post"}, "/cache": {"get", "delete"}}
EDGES = [
    ("num_inference_steps", 1),
    ("num_inference_steps", 150),
    ("guidance_scale", 1.0),
    ("guidance_scale", 20.0),
    ("guidance_scale", 5),
    ("width", 256),
    ("width", 1024),
    ("height", 256),
    ("height", 1024),
    ("seed", 0),
    ("seed", 2**63 - 1),
    ("seed", None),
    ("prompt", "x" * 2000),
    ("prompt", "ünïcödé 画 🎨\nsecond line"),
    ("negative_prompt", ""),
    ("negative_prompt", "x" * 2000),
    ("negative_prompt", None),
    ("scheduler", None),
    ("num_images", 1),
    ("num_images", 4),
    ("user_id", "A.user_with-every@kind.9"),
    ("user_id", "u" * 64),
]


def test_health_counts_the_models(server: Server) -> None:
    server.clear_cache()
    before = server.get("/health")
    assert before.keys() == {"status", "device", "models_loaded", "dtype", "version"}
    assert (before["status"], before["device"], before["models_loaded"]) == ("healthy", "cpu", 0)
    server.drawn()
    assert server.get("/health") == {**before, "models_loaded": 1}
    server.drawn(user_id="second")
    assert server.get("/health")["models_loaded"] == 2


def test_generate_answers_every_field(server: Server, output: Path) -> None:
    answer = server.drawn(user_id="user_123", seed=42)
    types = {
        "success": bool,
        "message": str,
        "image_base64": str,
        "image_path": str,
        "model_id": str,
        "generation_time": float,
        "image_id": str,
        "seed": int,
        "cache": str,
        "lane": str,
        "timings": dict,
        "images": list,
        "job_id": str,
        "warnings": list,
    }
    assert {name: type(value) for name, value in answer.items()} == types
    assert answer["success"] is True
    assert answer["message"] == "Image generated successfully"
    assert answer["seed"] == 42
    assert answer["lane"] == "exact"
    assert answer["timings"].keys() == {"queue", "load", "denoise", "decode", "encode"}
    assert all(seconds >= 0 for seconds in answer["timings"].values())
    assert answer["generation_time"] >= answer["timings"]["denoise"] > 0
    first = {name: answer[name] for name in ("image_id", "image_base64", "image_path", "seed")}
    assert answer["images"] == [first]

    path = Path(answer["image_path"])
    assert list(output.iterdir()) == [path]
    assert re.fullmatch(r"user_123_\d{8}_\d{6}_[0-9a-f]{12}\.png", path.name)
    assert answer["job_id"].endswith(path.stem[-12:])
    assert path.read_bytes() == png_of(answer)


def test_words_that_were_not_read_are_told_and_not_logged(server: Server) -> None:
    assert server.drawn()["warnings"] == []
    [warning] = server.drawn(prompt="word " * 100 + CANARY)["warnings"]
    assert CANARY in warning
    assert CANARY not in server.log


def test_the_defaults_are_those_of_the_contract(server: Server) -> None:
    answer = server.client.post("/generate", json={"prompt": CANARY}).json()
    assert open_png(png_of(answer)).size == (512, 512)
    explicit = server.drawn(**DEFAULTS, prompt=CANARY, seed=answer["seed"])
    assert difference(png_of(explicit), png_of(answer)) <= ROUNDING
    described = server.get("/openapi.json")["components"]["schemas"]["JobRequest"]
    assert described["required"] == ["prompt"]
    for name, default in DEFAULTS.items():
        assert described["properties"][name]["default"] == default


@pytest.mark.parametrize(("field", "value"), EDGES)
def test_the_bounds_themselves_are_allowed(server: Server, field: str, value: Any) -> None:
    server.drawn(**{field: value})


def test_the_picture_has_the_size_asked_for(server: Server) -> None:
    picture = open_png(png_of(server.drawn(width=320, height=256)))
    assert (picture.size, picture.mode) == ((320, 256), "RGB")


def test_a_seed_draws_its_picture_again(server: Server) -> None:
    answers = [server.drawn(seed=seed, reproducible=True) for seed in (1, 1, 2)]
    one, again, other = map(pixels_of, answers)
    assert one == again != other
    assert answers[0]["image_path"] != answers[1]["image_path"]


def test_a_random_seed_is_told_and_draws_its_picture_again(server: Server) -> None:
    one, other = server.drawn(), server.drawn()
    assert one["seed"] != other["seed"]
    assert difference(png_of(server.drawn(seed=one["seed"])), png_of(one)) <= ROUNDING


def test_each_user_has_their_model(server: Server, models: Path) -> None:
    default, second, nobody = (server.drawn(user_id=user, seed=3) for user in ("default", "second", "nobody"))
    assert default["model_id"] == nobody["model_id"] == str(models / "one")
    assert second["model_id"] == str(models / "two")
    assert difference(png_of(default), png_of(nobody)) <= ROUNDING
    assert difference(png_of(default), png_of(second)) > ROUNDING
    assert Path(nobody["image_path"]).name.startswith("nobody_")


def test_several_pictures_have_seeds_and_names_of_their_own(server: Server, output: Path) -> None:
    answer = server.drawn(num_images=3, seed=10)
    images = answer["images"]
    assert [image["seed"] for image in images] == [10, 11, 12]
    assert {Path(image["image_path"]) for image in images} == set(output.iterdir())
    stem = Path(answer["image_path"]).stem
    assert [Path(image["image_path"]).stem for image in images] == [stem, f"{stem}_2", f"{stem}_3"]
    assert len({image["image_id"] for image in images}) == 3
    for image in images:
        assert Path(image["image_path"]).read_bytes() == png_of(image)
        solo = server.drawn(seed=image["seed"])
        assert difference(png_of(image), png_of(solo)) <= ROUNDING


def test_each_scheduler_draws(server: Server) -> None:
    names = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
    same: dict[str, Any] = {"seed": 4, "num_inference_steps": 5, "reproducible": True}
    pictures = {name: pixels_of(server.drawn(scheduler=name, **same)) for name in names}
    assert len(set(pictures.values())) == len(names)
    assert pixels_of(server.drawn(**same)) == pictures["ddim"]


@pytest.mark.parametrize("change", [{"negative_prompt": "hats"}, {"guidance_scale": 1.0}, {"prompt": "a hat"}])
def test_what_is_asked_changes_the_picture(server: Server, change: dict[str, Any]) -> None:
    plain = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 20.0}
    changed = png_of(server.drawn(**{**plain, **change}))
    assert difference(changed, png_of(server.drawn(**plain))) > ROUNDING


def test_the_image_endpoint_answers_with_the_png(server: Server, output: Path, models: Path) -> None:
    answer = server.client.post("/generate/image", json={**ONE_STEP, "user_id": "second", "seed": 6})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["X-Model-Used"] == str(models / "two")
    assert float(answer.headers["X-Generation-Time"]) > 0
    assert answer.headers["X-Seed"] == "6"
    [saved] = output.iterdir()
    assert saved.read_bytes() == answer.content
    assert difference(answer.content, png_of(server.drawn(user_id="second", seed=6))) <= ROUNDING


def test_the_cache_tells_what_it_holds_and_frees_it(server: Server, models: Path) -> None:
    server.clear_cache()
    assert [server.drawn(user_id=user)["cache"] for user in ("default", "second", "second")] == ["miss", "miss", "hit"]
    cache = server.get("/cache")
    second, one = cache["models"]
    assert (one["model_id"], one["hits"], one["in_use"]) == (str(models / "one"), 0, 0)
    assert (second["model_id"], second["hits"], second["in_use"]) == (str(models / "two"), 1, 0)
    used, budget = cache["used_bytes"]["cpu"], cache["budget_bytes"]["cpu"]
    assert used < one["bytes"] + second["bytes"], "the autoencoder is held once"
    assert 0 < one["own_bytes"] < one["bytes"] < used < budget
    cleared = server.clear_cache()
    assert cleared["success"] is True
    assert (cleared["freed_bytes"], cleared["deferred_bytes"]) == (used, 0)
    assert server.get("/cache") == {**cache, "models": [], "used_bytes": {"cpu": 0}}
    assert server.get("/health")["models_loaded"] == 0
    assert server.clear_cache()["freed_bytes"] == 0


def test_a_stream_whose_end_was_told_stays_closed(server: Server) -> None:
    job_id = server.client.post("/jobs", json=ONE_STEP).json()["id"]
    told = server.client.get(f"/jobs/{job_id}/events").text
    assert "event: done\n" in told
    last = re.findall(r"^id: (\d+)$", told, re.MULTILINE)[-1]
    again = server.client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last})
    assert (again.status_code, again.content) == (204, b"")
    server.get("/health")


class _Links(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"src", "href"}]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_docs_need_no_internet(server: Server, page: str) -> None:
    answer = server.client.get(page)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    links = _Links(answer.text).found
    assert len(links) >= 2
    assert not re.findall(r"""["'(](?:https?:)?//[^"')]*""", answer.text)
    assert "/openapi.json" in answer.text
    for link in links:
        assert server.client.get(link).raise_for_status().content


def test_openapi_describes_every_field_with_an_example(server: Server) -> None:
    document = server.get("/openapi.json")
    for path, methods in CONTRACT.items():
        assert set(document["paths"][path]) == methods
    schemas = document["components"]["schemas"]
    properties = {name: schema.get("properties", {}) for name, schema in schemas.items()}
    fields = [(f"{name}.{field}", about) for name in properties for field, about in properties[name].items()]
    assert not [name for name, about in fields if not about.get("description")]
    request = schemas["JobRequest"]["properties"]
    assert request.keys() >= {*DEFAULTS, "prompt", "seed", "negative_prompt", "scheduler"}
    assert not [name for name, about in request.items() if not about.get("examples")]


@pytest.mark.parametrize("user", ["default", "ada", "bo", "chi"])
def test_the_bundled_models_draw(sitters: Server, user: str) -> None:
    answer = sitters.drawn(user_id=user)
    assert answer["model_id"] == ("models/demo" if user == "default" else f"models/sitters/{user}")
    assert open_png(png_of(answer)).size == (SMALL["width"], SMALL["height"])
