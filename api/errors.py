"""One tree of errors. Each carries its HTTP status, a stable code for programs and a hint for people.

SettingsError stands beside it: it stops the start, so that no client ever sees it.
"""


class SettingsError(Exception):
    """A setting is unknown or has a value that does not fit; the message says which, where and why."""


class SitterError(Exception):
    """Base of every error a caller may see.

    Args:
        detail: what happened, in one sentence.
        hint: what to do about it; the class's own hint when omitted.
    """

    status = 500
    code = "internal_error"
    hint = "Try again; if it stays, the server's log has the reason."

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if hint is not None:
            self.hint = hint


class InvalidRequest(SitterError):
    """The request does not fit the schema."""

    status = 422
    code = "invalid_request"
    hint = "See /docs for every field, its bounds and an example."


class UnsupportedSize(InvalidRequest):
    """The model cannot draw this width and height; the hint names the nearest size that it can."""

    code = "unsupported_size"


class BodyTooLarge(SitterError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"
    hint = "A request is a short JSON object; send less than 1 MB."


class Busy(SitterError):
    """As many requests are waiting as the server takes at once."""

    status = 503
    code = "busy"
    hint = "Wait a little and send it again."
    retry_after_seconds = 10


class ModelUnavailable(SitterError):
    """The user's model cannot be loaded: missing, unreachable, corrupt or of a kind that is refused."""

    status = 503
    code = "model_unavailable"
    hint = "Run `sitter doctor` on the server: it says which models load, and why not."


class EngineUnavailable(SitterError):
    """The libraries or the driver that drawing needs do not start."""

    status = 503
    code = "engine_unavailable"
    hint = "Run `sitter doctor` on the server; USE_GPU=false draws on the CPU when a GPU's driver is at fault."


class OutOfMemory(SitterError):
    """The device has no memory left for this picture, even after idle models were evicted."""

    status = 503
    code = "out_of_memory"
    hint = "Ask for a smaller width and height, or fewer pictures at once; fewer steps make it faster, not smaller."


class BadPicture(SitterError):
    """The model produced values that are not a picture (NaN or infinity); nothing was saved."""

    code = "bad_picture"
    hint = "Try another seed or a lower guidance_scale; with USE_GPU=false the model runs in a safer precision."


class Blocked(SitterError):
    """The model's own safety checker refused the picture; nothing was saved."""

    status = 422
    code = "content_blocked"
    hint = "Reword the prompt or try another seed."


class StorageFull(SitterError):
    """The disk has no room for the picture; nothing was left behind."""

    status = 507
    code = "storage_full"
    hint = "Free some space in the output folder (OUTPUT_DIR) and send it again."


class StorageUnavailable(SitterError):
    """The output folder cannot be written to; nothing was left behind."""

    code = "storage_unavailable"
    hint = "Set OUTPUT_DIR to a folder that the server may write to."


class ShuttingDown(SitterError):
    """The server is stopping and gave this picture up."""

    status = 503
    code = "shutting_down"
    hint = "Send it again once the server is back."
