"""Where a push goes: the Hub, as the user that is logged in, and the repository that the user may write to."""

from __future__ import annotations

from huggingface_hub import HfApi, constants, get_session, get_token

from serve.errors import InvalidRequest, ModelGated, ModelNotFound
from serve.hub.push_errors import writing
from serve.types import ModelId


def log_in(endpoint: str | None, token: str | None) -> HfApi:
    """The Hub as its user; None: as huggingface_hub is set up. Raises: ModelGated, InvalidRequest, StoreUnavailable."""
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    token = token or get_token()
    if not token:
        raise ModelGated(f"You are not logged in to {endpoint}: run 'hf auth login', or set HF_TOKEN.")
    _check_is_hub(endpoint)
    return HfApi(endpoint=endpoint, token=token)


def choose_target(hub: HfApi, model_id: str, to: str | None) -> str:
    """The id on the Hub, in a namespace. Raises: ModelGated, InvalidRequest, StoreUnavailable."""
    asked = None if to is None else _parse_target(to)
    with writing(to or model_id, hub.endpoint):
        me = hub.whoami()
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ModelGated(
            f"Your token for {hub.endpoint} may only read. Make one that may write at {hub.endpoint}/settings/tokens, "
            "then run 'hf auth login' or set HF_TOKEN."
        )
    if asked:
        return f"{asked.namespace or me['name']}/{asked.name}"
    own = ModelId.parse(model_id)
    orgs = {org["name"].lower() for org in me.get("orgs", ()) if org.get("roleInOrg") != "read"}
    is_member = own.namespace is not None and own.namespace.lower() in {me["name"].lower(), *orgs}
    return f"{own.namespace if is_member else me['name']}/{own.name}"


def _check_is_hub(endpoint: str) -> None:
    """A server has many addresses, and only its answer tells what it is. It is asked without the user's token."""
    with writing("the model", endpoint):
        answer = get_session().get(f"{endpoint}/v1/models", params={"limit": 1})
        if answer.is_server_error:
            answer.raise_for_status()
        is_ours = answer.is_success and "json" in answer.headers.get("content-type", "")
    if is_ours:
        raise InvalidRequest(
            f"{endpoint} is a server of models like the one to push from, and takes none: name the Hub with "
            "--endpoint, or unset HF_ENDPOINT."
        )


def _parse_target(to: str) -> ModelId:
    try:
        asked = ModelId.parse(to)
    except ModelNotFound:
        asked = None
    if asked is None or asked.revision:
        raise InvalidRequest(f"'{to[:100]}' cannot be the id of a model on the Hub: write org/name.", param="to")
    return asked
