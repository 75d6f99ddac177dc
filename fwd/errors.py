"""The error tree: every error a user can meet knows its HTTP status, wire code and exit code."""

from typing import ClassVar


class FwdError(Exception):
    """Base of all errors that are shown to a user: one line that names the thing and the way out.

    `param` names the request field at fault; `retry_after` is in seconds.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    exit_code: ClassVar[int] = 6

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class BadRequestError(FwdError):
    """A value in the request is wrong or would change the result in a way that is not supported."""

    status = 400
    code = "invalid_value"
    type = "invalid_request_error"
    exit_code = 5


class ContextLengthError(BadRequestError):
    """Prompt and answer do not fit in the context; the message gives both numbers."""

    code = "context_length_exceeded"


class GrammarError(BadRequestError):
    """The grammar of a request cannot be compiled, is too complex, or nothing of the vocabulary fits into it."""

    code = "invalid_grammar"


class UnauthorizedError(FwdError):
    """The request brings no key, or an unknown one."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"
    exit_code = 5


class ForbiddenError(FwdError):
    """The caller is known but may not do this: a foreign Host header, a cross-site page, a foreign user id."""

    status = 403
    code = "forbidden"
    type = "permission_error"
    exit_code = 5


class NotFoundError(FwdError):
    """No such route or request."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"
    exit_code = 5


class ModelNotFoundError(NotFoundError):
    """The model named in the request is not the one being served; the message lists the known names."""

    code = "model_not_found"


class MethodNotAllowedError(FwdError):
    """The route exists and does not take this method."""

    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"
    exit_code = 5


class RequestTimeoutError(FwdError):
    """The body of the request did not arrive in time."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"
    exit_code = 5


class BodyTooLargeError(FwdError):
    """The request body is over the limit; the message gives the limit."""

    status = 413
    code = "body_too_large"
    type = "invalid_request_error"
    exit_code = 5


class UnsupportedMediaError(FwdError):
    """The body is not JSON by its content type."""

    status = 415
    code = "unsupported_media_type"
    type = "invalid_request_error"
    exit_code = 5


class OverloadedError(FwdError):
    """The queue is full: try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"
    exit_code = 5


class NotReadyError(FwdError):
    """The daemon cannot serve at this moment: the model is loading, or the daemon is stopping."""

    status = 503
    code = "not_ready"
    type = "server_error"
    exit_code = 4


class DeadlineError(FwdError):
    """The deadline of the request passed before it was finished."""

    status = 504
    code = "deadline_exceeded"
    type = "server_error"
    exit_code = 5


class PoisonedError(FwdError):
    """The request, running alone, killed the engine again and again and was given up."""

    code = "poisoned"


class NonFiniteError(FwdError):
    """A row of logits held NaN or infinity: that request ended, no other was touched."""

    code = "non_finite_logits"


class EngineError(FwdError):
    """The engine failed and could not be brought back."""

    code = "engine_failed"


class BadFrameError(FwdError):
    """A frame of the fwd protocol was too long, truncated, of an unknown tag or of a wrong type."""

    status = 400
    code = "bad_frame"
    type = "invalid_request_error"
    exit_code = 6


class NotRunningError(FwdError):
    """No daemon listens on the socket."""

    status = 503
    code = "not_running"
    exit_code = 3


class ConfigError(FwdError):
    """A setting is wrong: the daemon does not start."""

    code = "bad_config"
    exit_code = 2


class KernelError(FwdError):
    """A GPU, its driver or its kernels cannot be used; the message says what is wrong and what would help."""

    code = "no_kernels"


class ModelError(FwdError):
    """The model folder cannot be served; the message names file and tensor or field."""

    code = "bad_model"
    exit_code = 2


def _tree(root: type[FwdError]) -> list[type[FwdError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def from_wire(code: str, message: str, param: str | None = None) -> FwdError:
    """The error that travelled as `code` and `message`; an unknown code gives an `EngineError` that names it."""
    for kind in _tree(FwdError):
        if kind.code == code:
            return kind(message, param=param)
    return EngineError(f"{code}: {message}")
