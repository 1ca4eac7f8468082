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

    retry_after_seconds: int | None = None  # the Retry-After of the answer

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


class DeadlinePassed(SitterError):
    """The job was not done by the deadline that it came with."""

    status = 504
    code = "deadline_passed"
    hint = "Ask again with a later deadline, or when fewer wait."


class UnsupportedSize(InvalidRequest):
    """The model cannot draw this width and height; the hint names the nearest size that it can."""

    code = "unsupported_size"


class BodyTooLarge(SitterError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"
    hint = "A request is a short JSON object; send less than 1 MB."


class BodyTooSlow(SitterError):
    """The request body took too long to arrive."""

    status = 408
    code = "body_too_slow"
    hint = "Send the whole body at once."


class Busy(SitterError):
    """As many requests are waiting as the server takes at once."""

    status = 503
    code = "busy"
    hint = "Wait a little and send it again."
    retry_after_seconds = 10


class LimitReached(SitterError):
    """A limit of this user is used up; the detail says which, the hint when it resets."""

    status = 429
    code = "limit_reached"
    hint = "GET /me shows every limit and what is left of it."

    def __init__(self, detail: str, hint: str | None = None, retry_after_seconds: int = 10) -> None:
        super().__init__(detail, hint)
        self.retry_after_seconds = retry_after_seconds


class NotAuthenticated(SitterError):
    """Nobody is named, or the credential is not valid (any more)."""

    status = 401
    code = "not_authenticated"
    hint = "Send `Authorization: Bearer sk_…` with an API key, or sign in."


class Forbidden(SitterError):
    """The caller may not do this."""

    status = 403
    code = "forbidden"
    hint = "Ask an administrator."


class NotFound(SitterError):
    """There is no such thing, or it belongs to somebody else."""

    status = 404
    code = "not_found"
    hint = "Check the id; what belongs to others is not found either."


class Conflict(SitterError):
    """It is there already, or changed meanwhile."""

    status = 409
    code = "conflict"
    hint = "Look at what is there, then decide."


class KeyReused(InvalidRequest):
    """An Idempotency-Key came back with another body."""

    code = "idempotency_key_reused"
    hint = "Use a new Idempotency-Key for a new request; the same key repeats the same request."


class Cancelled(SitterError):
    """The job was cancelled before its pictures were done."""

    status = 409
    code = "cancelled"
    hint = "Send it again if you want the picture after all."


class ModelUnavailable(SitterError):
    """The user's model cannot be loaded: missing, unreachable, corrupt or of a kind that is refused."""

    status = 503
    code = "model_unavailable"
    hint = "Run `sitter doctor` on the server: it says which models load, and why not."


class TrainingFailed(SitterError):
    """A training came to nothing."""

    status = 422
    code = "training_failed"
    hint = "Try other pictures, fewer steps or another seed."


class EngineUnavailable(SitterError):
    """The libraries or the driver that drawing needs do not start."""

    status = 503
    code = "engine_unavailable"
    hint = "Run `sitter doctor` on the server; USE_GPU=false draws on the CPU when a GPU's driver is at fault."


class DeviceLost(EngineUnavailable):
    """The device has failed while the server ran: jobs go back to the queue, and the process ends."""

    code = "device_lost"
    hint = "The server starts anew if something watches over it; if it does not come back, look at the GPU's driver."


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


class DatabaseUnavailable(SitterError):
    """The database cannot be reached or is locked for too long."""

    status = 503
    code = "database_unavailable"
    hint = "Wait a little and send it again; the operator finds DATABASE_URL's server down, or its file locked."
    retry_after_seconds = 5


class DatabaseNewer(SitterError):
    """A newer version has changed the tables: what it means by their rows is not known here."""

    status = 503
    code = "database_newer"
    hint = "Bring this installation to the version of those that use the same database, and start it again."


class Contended(DatabaseUnavailable):
    """Two writers waited for each other, and the database undid what this one had begun."""

    code = "database_contended"
    hint = "Send it again."
    retry_after_seconds = 1


class NotReady(SitterError):
    """The server should be sent no requests now; the detail says why."""

    status = 503
    code = "not_ready"
    hint = "Send requests to another server, or wait; /health/live says whether this one has to be started anew."
    retry_after_seconds = 5


def from_code(code: str, detail: str, hint: str) -> SitterError:
    """Returns the error that was kept as `code`, `detail` and `hint`."""
    kinds = [SitterError]
    for kind in kinds:
        if kind.code == code and kind is not SitterError:
            error = kind.__new__(kind)
            SitterError.__init__(error, detail, hint)
            return error
        kinds += kind.__subclasses__()
    return SitterError(detail, hint)
