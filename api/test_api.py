"""Runs every endpoint against a live server and saves the pictures in api/test_output/.

python test_api.py [--url http://127.0.0.1:8000]
"""

import argparse
import base64
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

__test__ = False  # a script for people, not for pytest

OUTPUT = Path(__file__).resolve().parent / "test_output"
PROMPT = "photo of sks person as a futuristic astronaut"
USERS = ("default", "ada", "bo", "chi")
TIMEOUT_SECONDS = 600  # a large model on a slow CPU takes minutes


def check_health(client: httpx2.Client) -> str:
    """Asks whether the server is up."""
    health = client.get("/health").raise_for_status().json()
    return f"{health['status']} on {health['device']}, {health['models_loaded']} models loaded"


def check_generate(client: httpx2.Client, user: str) -> str:
    """Draws a picture and reads it from the JSON answer."""
    answer = client.post("/generate", json={"prompt": PROMPT, "user_id": user, "seed": 42}).raise_for_status().json()
    path = _save(f"{user}.png", base64.b64decode(answer["image_base64"]))
    return f"{answer['model_id']} in {answer['generation_time']:.1f} s: {path}"


def check_image(client: httpx2.Client) -> str:
    """Draws a picture and takes the PNG itself."""
    answer = client.post("/generate/image", json={"prompt": PROMPT, "user_id": "ada"}).raise_for_status()
    path = _save("image.png", answer.content)
    return f"{answer.headers['X-Model-Used']} in {float(answer.headers['X-Generation-Time']):.1f} s: {path}"


def check_bad_request(client: httpx2.Client) -> str:
    """Sends what is not allowed, to see a clear error."""
    answer = client.post("/generate", json={"prompt": PROMPT, "num_inference_steps": 0})
    if answer.status_code != httpx2.codes.UNPROCESSABLE_ENTITY:
        raise ValueError(f"status {answer.status_code} for 0 steps, not 422")
    return str(answer.json()["detail"])


def check_docs(client: httpx2.Client) -> str:
    """Opens the page of the API."""
    return f"{len(client.get('/docs').raise_for_status().text)} characters"


def check_cache(client: httpx2.Client) -> str:
    """Lists the models in memory."""
    models = client.get("/cache").raise_for_status().json()["models"]
    return ", ".join(model["model_id"] for model in models) or "empty"


def check_clear(client: httpx2.Client) -> str:
    """Empties the model cache."""
    return str(client.delete("/cache").raise_for_status().json()["message"])


CHECKS: list[tuple[str, Callable[[httpx2.Client], str]]] = [
    ("GET /health", check_health),
    *((f"POST /generate ({user})", lambda client, user=user: check_generate(client, user)) for user in USERS),
    ("POST /generate/image", check_image),
    ("POST /generate (bad)", check_bad_request),
    ("GET /docs", check_docs),
    ("GET /cache", check_cache),
    ("DELETE /cache", check_clear),
]


def main() -> int:
    """Runs every check, a line each; returns 1 at the first that fails."""
    parser = argparse.ArgumentParser(description="Runs every endpoint against a live server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is [%(default)s]")
    url = parser.parse_args().url
    with httpx2.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        for name, check in CHECKS:
            began = time.perf_counter()
            try:
                said = check(client)
            except httpx2.ConnectError:
                print(f"No server answers at {url}. Start one with `python main.py`, or say where it is with --url.")
                return 1
            except httpx2.HTTPStatusError as error:
                print(f"FAIL  {name}: status {error.response.status_code}: {error.response.text}")
                return 1
            except (httpx2.HTTPError, KeyError, ValueError, OSError) as error:
                print(f"FAIL  {name}: {error!r}")
                return 1
            print(f"ok    {name}: {said} ({time.perf_counter() - began:.1f} s)")
    print(f"Every endpoint works. The pictures are in {OUTPUT}.")
    return 0


def _save(name: str, png: bytes) -> Path:
    if not png.startswith(b"\x89PNG"):
        raise ValueError("the answer is not a PNG")
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / name).write_bytes(png)
    return OUTPUT / name


if __name__ == "__main__":
    sys.exit(main())
