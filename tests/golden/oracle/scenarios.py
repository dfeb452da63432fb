"""Scenarios, by name in `S`; run by tests/test_golden.py."""
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fake_backend import jresp

S = {}          # name -> (fn, predicate on sdk)


def sc(only=None):
    def d(fn):
        S[fn.__name__] = (fn, only)
        return fn
    return d


def T(name, params=(), required=(), auth=(None, None, None), desc="d"):
    return ('@client.register_tool(function_name=%r, params=%r, required_params=%r, description=%r, '
            'auth_provider=%r, auth_type=%r, auth_with=%r)\n' % (name, list(params), list(required), desc, *auth))


def js(data):
    try:
        return json.loads(data)
    except Exception:
        return None if data is None else {"_raw": data[:100].decode("utf-8", "replace")}


ECHO = T("echo", ["text"], ["text"]) + 'def echo(**kwargs):\n    return {"echo": kwargs.get("text")}\n'

SEED = '''
@client.register_tool(
function_name="hello_world",
params=['name'],
required_params=['name'],
description="Returns a greeting.",
auth_provider=None, auth_type=None, auth_with=None
)
def hello_world(**kwargs):
    return {"message": f"Hello, {kwargs.get('name', 'World')}!"}

@client.register_tool(
function_name="create_company",
params=['name', 'domain', 'industry'],
required_params=['name', 'domain', 'industry'],
description="Creates a company in HubSpot.",
auth_provider="hubspot", auth_type="OAuth2", auth_with="access_token"
)
def create_company(**kwargs):
    access_token = kwargs.get('auth_token')
    url = "@@HUB@@/crm/v3/objects/companies"
    headers = {"Authorization": f"Bearer {access_token}", "Content-Type": "application/json"}
    data = {"properties": {
    "name": kwargs.get('name'),
    "domain": kwargs.get('domain'),
    "industry": kwargs.get('industry')
    }}
    response = requests.post(url, json=data, headers=headers)
    return response.json()

@client.register_tool(
function_name="echo",
params=['text'],
required_params=['text'],
description="Echoes the input text.",
auth_provider=None, auth_type=None, auth_with=None
)
def echo(**kwargs):
    return {"echo": kwargs.get('text')}

@client.register_tool(
function_name="get_contacts",
params=['auth_token'],
required_params=['auth_token'],
description="Fetches contacts from HubSpot.",
auth_provider="hubspot", auth_type="OAuth2", auth_with="access_token"
)
def get_contacts(**kwargs):
    access_token = kwargs.get('auth_token')
    url = "@@HUB@@/crm/v3/objects/contacts"
    headers = {"Authorization": f"Bearer {access_token}"}
    response = requests.get(url, headers=headers)
    return response.json()
'''


def hub_http(r):
    base = r.b.default_http

    async def h(method, target, hd, body):
        if "/crm/" in target:
            return jresp({"fake_hubspot": target.rsplit("/", 1)[-1], "authorization_seen": hd.get("authorization"),
                          "body_seen": body})
        return await base(method, target, hd, body)
    return h


# ---------------------------------------------------------------- registration
@sc()
async def register_seed_toolkit_offline(r):
    """The seed page's four example tools, bodies verbatim, no route to api.hubapi.com: registration requests only."""
    await r.client(SEED.replace("@@HUB@@", "https://api.hubapi.com"), extra_imports="import requests")
    r.result["registered"] = await r.wait_registered(4, 30)
    ws = await r.b.next_ws(10)
    r.result["ws_path"] = ws.path if ws else None
    await asyncio.sleep(0.3)


@sc()
async def register_seed_toolkit_with_fake_hubspot(r):
    """Same, HubSpot host swapped for a loopback stand-in, then each tool called with and without auth_token."""
    r.b.http_handler = hub_http(r)
    await r.client(SEED.replace('"@@HUB@@', 'os.environ["ATP_BASE_URL"] + "'), extra_imports="import requests")
    ws = await r.b.next_ws(30)
    await ws.hello()
    out = {}
    for rid, tool, params, tok in [
        ("q1", "hello_world", {"name": "Ada"}, None), ("q2", "echo", {"text": "hi"}, None),
        ("q3", "create_company", {"name": "Acme", "domain": "acme.com", "industry": "Tech"}, "ACCESS_TOKEN"),
        ("q4", "get_contacts", {}, "ACCESS_TOKEN"), ("q5", "get_contacts", {}, None),
        ("q6", "get_contacts", {"auth_token": "IN_PARAMS"}, None)]:
        extra = {} if tok is None else {"auth_token": tok}
        await ws.request(rid, tool, params, **extra)
        out[rid + ":" + tool] = js(await ws.recv(5))
    r.result["responses"] = out


@sc()
async def register_signature_kinds(r):
    """How the sample invocation and source capture behave for different callables."""
    await r.client(
        T("kw", ["a", "b"], ["a"]) + 'def kw(**kwargs):\n    return {"got": dict(sorted(kwargs.items()))}\n'
        + T("named", ["a", "b"], ["a"]) + 'def named(a, b=2):\n    return {"a": a, "b": b}\n'
        + T("named_auth", ["a"], ["a"]) + 'def named_auth(a, auth_token):\n    return {"a": a, "t": auth_token}\n'
        + T("no_params", [], []) + 'def no_params():\n    return "plain string"\n'
        + T("returns_none", [], []) + 'def returns_none(**kwargs):\n    pass\n'
        + T("unicode_\u00e9", ["\u540d"], []) + 'def uni(**kwargs):\n    return "\u2713 \U0001f600"\n'
        + T("kw", ["dup"], []) + 'def kw_again(**kwargs):\n    return "second registration of the same name"\n')
    r.result["registered"] = await r.wait_registered(7, 15)
    ws = await r.b.next_ws(10)
    out = {}
    for rid, tool, params in [("q1", "kw", {"dup": 1}), ("q2", "named", {"a": 1}), ("q3", "unicode_\u00e9", {"\u540d": "\u6f22\u5b57"}),
                              ("q4", "returns_none", {}), ("q5", "no_params", {})]:
        await ws.request(rid, tool, params)
        out[rid] = js(await ws.recv(5))
    r.result["responses"] = out


@sc()
async def register_no_source_exec(r):
    """Decorating a function whose source cannot be read (made with exec)."""
    await r.client('ns = {"client": client}\nexec("def f(**kw):\\n    return 1\\n", ns)\n'
                   'client.register_tool("f", [], [], "d", None, None, None)(ns["f"])\n')
    r.result["exit"] = await r.wait_exit(10)


@sc()
async def register_class_instance_and_partial(r):
    """Callables that are not plain functions."""
    await r.client('import functools\nclass C:\n    def __call__(self, **kw):\n        return 1\n'
                   'for nm, f in (("inst", C()), ("part", functools.partial(int, "1")), ("builtin", len)):\n'
                   '    try:\n        client.register_tool(nm, [], [], "d", None, None, None)(f)\n        print("OK", nm)\n'
                   '    except BaseException as e:\n        print("RAISED", nm, type(e).__name__, e)\n', start="print('DONE')\n")
    r.result["exit"] = await r.wait_exit(10)


@sc()
async def register_api_key_parameter_name(r):
    """A tool whose signature names access_token or api_key."""
    await r.client('for nm in ("access_token", "api_key"):\n    pass\n'
                   'try:\n    @client.register_tool("t1", ["api_key"], [], "d", None, None, None)\n    def t1(api_key=None, **kw):\n        return 1\n'
                   '    print("t1 OK")\nexcept BaseException as e:\n    print("t1 RAISED", type(e).__name__, e)\n'
                   'try:\n    @client.register_tool("t2", ["access_token"], [], "d", None, None, None)\n    def t2(access_token=None, **kw):\n        return 1\n'
                   '    print("t2 OK")\nexcept BaseException as e:\n    print("t2 RAISED", type(e).__name__, e)\n', start="print('DONE')\n")
    r.result["exit"] = await r.wait_exit(10)
    r.result["printed"] = [l for l in r.log().splitlines() if l.startswith(("t1", "t2", "DONE"))]


@sc()
async def register_sample_returns_unserializable(r):
    """Sample invocation returns something json cannot encode (a set)."""
    await r.client(T("s", [], []) + 'def s(**kwargs):\n    return {1, 2}\n')
    r.result["exit"] = await r.wait_exit(10)


@sc()
async def register_sample_async_def(r):
    """An async def tool."""
    await r.client(T("a", [], []) + 'async def a(**kwargs):\n    return 1\n')
    r.result["exit"] = await r.wait_exit(5)
    ws = await r.b.next_ws(3)
    if ws:
        await ws.request("q1", "a")
        r.result["response"] = js(await ws.recv(3))


@sc()
async def register_sample_sys_exit(r):
    """A tool that calls sys.exit(3) unconditionally (so also in the sample invocation)."""
    await r.client(T("x", [], []) + 'def x(**kwargs):\n    import sys\n    sys.exit(3)\n')
    r.result["exit"] = await r.wait_exit(5)
    r.result["register_requests"] = sum(1 for m in r.b.http_log if m[1] == "/api/v1/register_tool")


@sc()
async def register_sample_keyboardinterrupt(r):
    """A tool that raises KeyboardInterrupt in its sample invocation."""
    await r.client(T("x", [], []) + 'def x(**kwargs):\n    raise KeyboardInterrupt\n')
    r.result["exit"] = await r.wait_exit(5)
    r.result["register_requests"] = sum(1 for m in r.b.http_log if m[1] == "/api/v1/register_tool")


@sc()
async def register_sample_slow(r):
    """A tool that takes 3 s: does registration wait for it?"""
    await r.client(T("slow", [], []) + 'def slow(**kwargs):\n    import time\n    time.sleep(3)\n    return "done"\n')
    t = time.monotonic()
    await r.wait_registered(1, 10)
    r.result["seconds_until_register_request"] = round(time.monotonic() - t, 1)


@sc()
async def register_server_down(r):
    """Nothing listens on the backend port when the decorator runs."""
    await r.b.stop_listening()
    await r.client(ECHO)
    r.result["exit"] = await r.wait_exit(10)
    r.result["last_log_line"] = r.log().strip().splitlines()[-1][:200] if r.log().strip() else ""


def _status_sc(status, body=b'{"detail": "nope"}', hdrs=None, label=None):
    async def f(r):
        base = r.b.default_http

        async def h(method, target, hd, b):
            if target == "/api/v1/register_tool":
                return status, dict({"Content-Type": "application/json"}, **(hdrs or {})), body
            return await base(method, target, hd, b)
        r.b.http_handler = h
        await r.client(ECHO)
        ws = await r.b.next_ws(6)
        if ws:
            await ws.request("q1", "echo", {"text": "hi"})
            r.result["response_after_failed_registration"] = js(await ws.recv(3))
        r.result["exit"] = await r.wait_exit(0.2)
        r.result["log"] = [l for l in r.log().splitlines() if "register" in l.lower() or "Error" in l][:4]
        r.result["register_requests"] = sum(1 for m in r.b.http_log if m[1] == "/api/v1/register_tool")
    f.__name__ = "register_http_" + (label or str(status))
    f.__doc__ = "Registration answered with %s %r: does the client go on to connect and serve?" % (status, body[:40])
    S[f.__name__] = (f, None)


for st in (201, 202, 204, 400, 401, 403, 404, 409, 422, 429, 500, 502, 503):
    _status_sc(st, b"" if st == 204 else b'{"detail": "nope"}')
_status_sc(200, b"<html>ok</html>", label="200_not_json")
_status_sc(200, b"{}", label="200_no_exchange_token")
_status_sc(200, b"[]", label="200_json_list")
_status_sc(302, b"", {"Location": "/elsewhere"}, label="302_redirect")
_status_sc(307, b"", {"Location": "/elsewhere"}, label="307_redirect")


@sc()
async def register_server_hangs(r):
    """The backend accepts the POST and never answers (watched for 20 s)."""
    async def h(method, target, hd, b):
        await asyncio.sleep(60)
    r.b.http_handler = h
    await r.client(ECHO)
    r.result["exit_within_20s"] = await r.wait_exit(20)
    r.result["ws_opened"] = (await r.b.next_ws(0.1)) is not None


@sc()
async def register_server_drops_connection(r):
    """The backend closes the TCP connection without answering the POST."""
    async def h(method, target, hd, b):
        return None
    r.b.http_handler = h
    await r.client(ECHO)
    r.result["exit"] = await r.wait_exit(8)
    r.result["log_tail"] = r.log().strip().splitlines()[-1:] 


# ---------------------------------------------------------------- calls
@sc()
async def call_normal(r):
    """atp_client_connected, then one request, one response; then the same request_id again."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    await ws.hello()
    await ws.request("11111111-2222-3333-4444-555555555555", "echo", {"text": "hello"})
    r.result["first"] = js(await ws.recv(5))
    await ws.request("11111111-2222-3333-4444-555555555555", "echo", {"text": "hello"})
    r.result["same_request_id_again"] = js(await ws.recv(5))
    await ws.request("u", "echo", {"text": "\u00e9 \u6f22\u5b57 \U0001f600 \ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")})
    r.result["unicode"] = js(await ws.recv(5))
    await ws.send_text('{"message_type":"atp_tool_request","payload":{"request_id":"s","tool_name":"echo","params":{"text":"\\ud800"}}}')
    r.result["lone_surrogate"] = (await ws.recv(5) or b"").decode()
    await ws.request(12345, "echo", {"text": 1})
    r.result["integer_request_id"] = js(await ws.recv(5))
    r.result["execute_function_posts"] = sum(1 for m in r.b.http_log if "execute_function" in m[1])


@sc()
async def call_before_hello(r):
    """A request as the very first frame, no atp_client_connected."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    await ws.request("q", "echo", {"text": "x"})
    r.result["response"] = js(await ws.recv(5))
    r.result["client_spoke_first"] = any(e.get("chan") == "ws" and e["dir"] == "c2s" and e["frame"] == "text" and e["n"] < 4 for e in r.b.rec.events)


AUTHTOOLS = (
    T("kw_auth", ["q"], ["q"], ("hubspot", "OAuth2", "access_token")) + 'def kw_auth(**kwargs):\n    return {"kwargs": dict(sorted(kwargs.items()))}\n'
    + T("sig_auth", ["q"], ["q"], ("hubspot", "OAuth2", "access_token")) + 'def sig_auth(q=None, auth_token="DEFAULT"):\n    return {"q": q, "auth_token": auth_token}\n'
    + T("sig_auth_req", ["q"], ["q"], ("hubspot", "OAuth2", "access_token")) + 'def sig_auth_req(auth_token, q=None):\n    return {"q": q, "auth_token": auth_token}\n'
    + T("strict", ["q"], ["q"]) + 'def strict(q=None):\n    return {"q": q}\n')


@sc()
async def call_auth_token(r):
    """auth_token present, absent, null, empty and falsy, against four signatures."""
    await r.client(AUTHTOOLS)
    ws = await r.b.next_ws(10)
    out = {}
    for tool in ("kw_auth", "sig_auth", "sig_auth_req", "strict"):
        for lab, extra in (("present", {"auth_token": "TOK"}), ("absent", {}), ("null", {"auth_token": None}),
                           ("empty", {"auth_token": ""}), ("object", {"auth_token": {"a": 1}})):
            await ws.request(tool + ":" + lab, tool, {"q": 1}, **extra)
            m = js(await ws.recv(5))
            out[tool + ":" + lab] = m and m.get("result")
        await ws.request(tool + ":inparams", tool, {"q": 1, "auth_token": "INPARAMS"}, auth_token="OUTER")
        m = js(await ws.recv(5))
        out[tool + ":in_params_and_outer"] = m and m.get("result")
    r.result["results"] = out


@sc()
async def call_exceptions(r):
    """Exceptions of several kinds raised by a tool; what becomes the error text."""
    await r.client(T("boom", ["k"], ["k"]) + '''
def boom(**kwargs):
    k = kwargs.get("k")
    if k == "value": raise ValueError("boom")
    if k == "empty": raise RuntimeError()
    if k == "key": return {}["missing"]
    if k == "multi": raise Exception("a", 1)
    if k == "unicode": raise Exception("\\u00e9\\u6f22")
    if k == "recursion":
        def f(): return f()
        return f()
    if k == "zerodiv": return 1/0
    if k == "assert": assert False, "assertion text"
    if k == "stopiter": raise StopIteration("si")
    if k == "genexit": raise GeneratorExit("ge")
    if k == "badstr":
        class E(Exception):
            def __str__(self): raise TypeError("str failed")
        raise E()
    if k == "group": raise ExceptionGroup("eg", [ValueError("x"), TypeError("y")])
    if k == "import": import does_not_exist_xyz
    return "sample ok"
''')
    ws = await r.b.next_ws(10)
    out = {}
    for k in ("value", "empty", "key", "multi", "unicode", "recursion", "zerodiv", "assert", "stopiter", "badstr", "group", "import"):
        await ws.request(k, "boom", {"k": k})
        m = js(await ws.recv(3))
        out[k] = m and m.get("result")
    await ws.request("genexit", "boom", {"k": "genexit"})
    m = js(await ws.recv(2))
    out["genexit"] = m and m.get("result")
    ws2 = await r.b.next_ws(3)
    out["genexit_then"] = "reconnected" if ws2 else "same connection / thread dead"
    r.result["results"] = out


@sc()
async def call_missing_required_param(r):
    """A required parameter is not in params (and extra, null, wrong-typed ones)."""
    await r.client(
        T("kwtool", ["name", "age"], ["name"]) + 'def kwtool(**kwargs):\n    return {"name": kwargs.get("name"), "n": len(kwargs)}\n'
        + T("sigtool", ["name", "age"], ["name"]) + 'def sigtool(name, age=1):\n    return {"name": name, "age": age}\n'
        + T("subscr", ["name"], ["name"]) + 'def subscr(**kwargs):\n    return kwargs["name"]\n')
    ws = await r.b.next_ws(10)
    out = {}
    for tool in ("kwtool", "sigtool", "subscr"):
        for lab, p in (("missing", {}), ("null", {"name": None}), ("unknown_extra", {"name": "x", "zzz": 1}), ("wrong_type", {"name": [1, {"a": 2}]})):
            await ws.request(tool + ":" + lab, tool, p)
            m = js(await ws.recv(3))
            out[tool + ":" + lab] = m and m.get("result")
    r.result["results"] = out


@sc()
async def call_unknown_tool(r):
    """Unknown tool_name, null tool_name, missing tool_name, unhashable tool_name."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    out = {}
    for lab, pl in (("unknown", {"request_id": "a", "tool_name": "nope", "params": {}}),
                    ("null", {"request_id": "b", "tool_name": None, "params": {}}),
                    ("absent", {"request_id": "c", "params": {}}),
                    ("unhashable", {"request_id": "d", "tool_name": ["echo"], "params": {}}),
                    ("wrong_case", {"request_id": "e", "tool_name": "Echo", "params": {}})):
        await ws.send_json({"message_type": "atp_tool_request", "payload": pl})
        m = await ws.quiet(0.7)
        out[lab] = js(m)
    await ws.request("alive", "echo", {"text": "still there"})
    out["then_valid"] = js(await ws.recv(3))
    r.result["results"] = out


@sc()
async def call_return_values(r):
    """Return values: serialisable ones of every JSON type, and ones json.dumps rejects."""
    await r.client(T("ret", ["k"], ["k"]) + '''
def ret(**kwargs):
    k = kwargs.get("k")
    import datetime, decimal, uuid, collections, enum, dataclasses, math
    if k == "none": return None
    if k == "int": return 7
    if k == "bigint": return 10**30
    if k == "float": return 1.5
    if k == "bool": return True
    if k == "str": return "s"
    if k == "list": return [1, "a", None]
    if k == "tuple": return (1, 2)
    if k == "empty": return {}
    if k == "intkey": return {1: "a", None: "b", True: "c", 2.5: "d"}
    if k == "tuplekey": return {(1, 2): "a"}
    if k == "nan": return {"v": float("nan")}
    if k == "inf": return {"v": -math.inf}
    if k == "set": return {1}
    if k == "bytes": return b"abc"
    if k == "datetime": return datetime.datetime(2020, 1, 1)
    if k == "decimal": return decimal.Decimal("1.1")
    if k == "uuid": return uuid.UUID(int=0)
    if k == "object": return object()
    if k == "generator": return (i for i in range(3))
    if k == "circular":
        d = {}; d["d"] = d; return d
    if k == "deep":
        d = []
        for _ in range(5000): d = [d]
        return d
    if k == "exception_obj": return ValueError("returned not raised")
    if k == "ordereddict": return collections.OrderedDict([("z", 1), ("a", 2)])
    if k == "intenum":
        class E(enum.IntEnum):
            A = 1
        return E.A
    if k == "dataclass":
        @dataclasses.dataclass
        class D:
            x: int = 1
        return D()
    if k == "error_dict": return {"error": "application level error"}
    return "sample"
''')
    ws = await r.b.next_ws(10)
    out = {}
    for k in ("none int bigint float bool str list tuple empty intkey tuplekey nan inf set bytes datetime decimal uuid object "
              "generator circular deep exception_obj ordereddict intenum dataclass error_dict").split():
        await ws.request(k, "ret", {"k": k})
        raw = await ws.recv(3)
        out[k] = None if raw is None else raw.decode()[:300]
    r.result["raw_response_text"] = out


@sc()
async def call_malformed_frames(r):
    """Frames that are not what the client expects; after each, is it still serving?"""
    await r.client(ECHO + T("opt", [], []) + 'def opt(**kwargs):\n    return {"kwargs": kwargs}\n')
    ws = await r.b.next_ws(10)
    texts = [
        ("not_json", "this is not json{"), ("empty_text", ""), ("json_array", "[1,2]"), ("json_string", '"x"'), ("json_null", "null"),
        ("no_message_type", '{"payload": {"request_id": "a", "tool_name": "echo", "params": {}}}'),
        ("type_instead_of_message_type", '{"type": "atp_tool_request", "payload": {"request_id": "a", "tool_name": "echo", "params": {"text": 1}}}'),
        ("unknown_message_type", '{"message_type": "atp_future_thing", "payload": {}}'),
        ("no_payload", '{"message_type": "atp_tool_request"}'),
        ("payload_null", '{"message_type": "atp_tool_request", "payload": null}'),
        ("payload_list", '{"message_type": "atp_tool_request", "payload": []}'),
        ("connected_without_message", '{"message_type": "atp_client_connected", "payload": {}}'),
        ("connected_without_payload", '{"message_type": "atp_client_connected"}'),
        ("no_request_id", '{"message_type": "atp_tool_request", "payload": {"tool_name": "opt", "params": {}}}'),
        ("no_params", '{"message_type": "atp_tool_request", "payload": {"request_id": "p0", "tool_name": "opt"}}'),
        ("params_null", '{"message_type": "atp_tool_request", "payload": {"request_id": "p1", "tool_name": "opt", "params": null}}'),
        ("params_list", '{"message_type": "atp_tool_request", "payload": {"request_id": "p2", "tool_name": "opt", "params": [1]}}'),
        ("params_string", '{"message_type": "atp_tool_request", "payload": {"request_id": "p3", "tool_name": "opt", "params": "x=1"}}'),
        ("params_json_string", '{"message_type": "atp_tool_request", "payload": {"request_id": "p4", "tool_name": "opt", "params": "{\\"a\\": 1}"}}'),
        ("params_null_with_token", '{"message_type": "atp_tool_request", "payload": {"request_id": "p5", "tool_name": "opt", "params": null, "auth_token": "T"}}'),
        ("params_non_identifier_keys", '{"message_type": "atp_tool_request", "payload": {"request_id": "p6", "tool_name": "opt", "params": {"a b": 1, "": 2, "class": 3}}}'),
        ("params_key_self", '{"message_type": "atp_tool_request", "payload": {"request_id": "p7", "tool_name": "opt", "params": {"self": 1, "kwargs": 2, "func": 3}}}'),
        ("duplicate_json_keys", '{"message_type": "atp_client_connected", "message_type": "atp_tool_request", "payload": {"request_id": "p8", "tool_name": "opt", "params": {"a": 1, "a": 2}}}'),
        ("extra_fields", '{"message_type": "atp_tool_request", "version": 9, "payload": {"request_id": "p9", "tool_name": "opt", "params": {}, "zzz": [1]}}'),
        ("nan_in_params", '{"message_type": "atp_tool_request", "payload": {"request_id": "p10", "tool_name": "opt", "params": {"v": NaN}}}'),
        ("leading_whitespace", '  \n {"message_type": "atp_tool_request", "payload": {"request_id": "p11", "tool_name": "opt", "params": {}}}  '),
        ("bom", '\ufeff{"message_type": "atp_tool_request", "payload": {"request_id": "p12", "tool_name": "opt", "params": {}}}'),
    ]
    out = {}
    for lab, t in texts:
        r.note("case: " + lab)
        await ws.send_text(t)
        raw = await ws.recv(0.5)
        out[lab] = None if raw is None else raw.decode()
    good = json.dumps({"message_type": "atp_tool_request", "payload": {"request_id": "bin", "tool_name": "opt", "params": {}}}).encode()
    r.note("case: binary frame with valid JSON")
    await ws.send_frame(2, good)
    raw = await ws.recv(0.7)
    out["binary_valid_json"] = None if raw is None else raw.decode()
    r.note("case: text split over three frames (continuation)")
    await ws.send_frame(1, good[:20], fin=False)
    await ws.send_frame(0, good[20:40], fin=False)
    await ws.send_frame(0, good[40:], fin=True)
    raw = await ws.recv(0.7)
    out["fragmented"] = None if raw is None else raw.decode()
    r.note("case: ping between the fragments")
    await ws.send_frame(1, good[:20], fin=False)
    await ws.ping(b"mid")
    await ws.send_frame(0, good[20:], fin=True)
    raw = await ws.recv(0.7)
    out["ping_between_fragments"] = None if raw is None else raw.decode()
    await ws.request("alive", "echo", {"text": "still there"})
    out["then_valid"] = js(await ws.recv(3))
    r.note("case: invalid UTF-8 in a text frame")
    await ws.send_frame(1, b'{"a": "\xff\xfe"}')
    ws2 = await r.b.next_ws(3)
    out["invalid_utf8"] = "client reconnected" if ws2 else "same connection"
    ws = ws2 or ws
    await ws.request("alive2", "echo", {"text": "x"})
    out["after_invalid_utf8"] = js(await ws.recv(3))
    r.note("case: reserved opcode 3")
    await ws.send_frame(3, b"x")
    ws2 = await r.b.next_ws(3)
    out["reserved_opcode"] = "client reconnected" if ws2 else "same connection"
    r.result["responses"] = out


@sc()
async def call_huge(r):
    """8 MB result and 8 MB parameter: one frame each? limits?"""
    await r.client(T("big", ["n"], ["n"]) + 'def big(**kwargs):\n    n = kwargs.get("n")\n    return {"s": "x" * n} if isinstance(n, int) else {"len": len(n)}\n')
    ws = await r.b.next_ws(10)
    t = time.monotonic()
    await ws.request("big", "big", {"n": 8 * 1024 * 1024})
    d = await ws.recv(30)
    r.result["result_8MB"] = {"bytes": len(d) if d else None, "seconds": round(time.monotonic() - t, 2),
                              "frames": sum(1 for e in r.b.rec.events if e.get("dir") == "c2s" and e.get("frame") in ("text", "cont"))}
    t = time.monotonic()
    await ws.request("bigin", "big", {"n": "y" * (8 * 1024 * 1024)})
    r.result["param_8MB"] = js(await ws.recv(30))
    r.result["param_seconds"] = round(time.monotonic() - t, 2)
    t = time.monotonic()
    await ws.request("64MB", "big", {"n": 64 * 1024 * 1024})
    d = await ws.recv(60)
    r.result["result_64MB"] = {"bytes": len(d) if d else None, "seconds": round(time.monotonic() - t, 2)}


SLOW = T("slow", ["s", "tag"], ["s"]) + '''
def slow(**kwargs):
    import time
    s = kwargs.get("s")
    if isinstance(s, (int, float)):
        t0 = time.time(); time.sleep(s)
        return {"tag": kwargs.get("tag")}
    return "sample"
'''


@sc()
async def call_parallel_slow(r):
    """Three requests of 1 s each sent back to back, then a fast one: serialised or concurrent?"""
    await r.client(SLOW + ECHO)
    ws = await r.b.next_ws(10)
    t = time.monotonic()
    for i in range(3):
        await ws.request("s%d" % i, "slow", {"s": 1, "tag": i})
    await ws.request("fast", "echo", {"text": "fast"})
    arr = []
    for _ in range(4):
        m = js(await ws.recv(8))
        arr.append([m and m["request_id"], round(time.monotonic() - t, 1)])
    r.result["arrivals"] = arr


@sc()
async def ping_idle(r):
    """Server pings with and without payload while the client is idle; an unsolicited pong."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    await ws.ping(b"")
    await ws.ping(b"payload-123")
    await ws.ping(b"z" * 125)
    await ws.send_frame(10, b"unsolicited")
    await asyncio.sleep(1)
    r.result["pongs"] = [e["payload"].get("text") for e in r.b.rec.events if e.get("frame") == "pong" and e["dir"] == "c2s"]


@sc()
async def ping_during_slow_tool(r):
    """Server ping while a 4 s tool runs: when does the pong come?"""
    await r.client(SLOW)
    ws = await r.b.next_ws(10)
    await ws.request("s", "slow", {"s": 4, "tag": 1})
    await asyncio.sleep(0.5)
    t = time.monotonic()
    await ws.ping(b"are-you-there")
    while not any(e.get("frame") == "pong" and e["dir"] == "c2s" for e in r.b.rec.events) and time.monotonic() - t < 10:
        await asyncio.sleep(0.05)
    r.result["pong_after_s"] = round(time.monotonic() - t, 1)
    r.result["response"] = js(await ws.recv(5))


@sc()
async def ping_client_schedule(r):
    """Idle for 130 s: when does the client ping on its own?"""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    t0 = r.b.rec.events[-1]["t_ms"]
    await asyncio.sleep(130)
    r.result["client_pings_at_s"] = [round((e["t_ms"] - t0) / 1000, 1) for e in r.b.rec.events if e.get("frame") == "ping" and e["dir"] == "c2s"]
    r.result["ping_payloads"] = [e["payload"] for e in r.b.rec.events if e.get("frame") == "ping" and e["dir"] == "c2s"]


@sc()
async def ping_not_answered(r):
    """Server never answers the client's pings (watched 130 s): does the client drop the connection?"""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    ws.auto_pong = False
    await asyncio.sleep(130)
    r.result["client_pings"] = sum(1 for e in r.b.rec.events if e.get("frame") == "ping" and e["dir"] == "c2s")
    r.result["reconnected"] = r.b.ws_attempts > 1


# ---------------------------------------------------------------- connection life
def _close_sc(code, label):
    async def f(r):
        await r.client(ECHO)
        ws = await r.b.next_ws(10)
        regs = len([1 for m in r.b.http_log if m[1] == "/api/v1/register_tool"])
        t = time.monotonic()
        if label == "tcp_abort":
            ws.abort()
        elif label == "tcp_fin":
            r.b.rec.add(dir="s2c", chan="ws", conn=ws.cid, frame="tcp_fin")
            ws.w.close()
        else:
            await ws.close(code, "bye" if code else "")
        ws2 = await r.b.next_ws(12)
        r.result["reconnected_after_s"] = round(time.monotonic() - t, 2) if ws2 else None
        if ws2:
            await ws2.request("after", "echo", {"text": "x"})
            r.result["call_after_reconnect"] = js(await ws2.recv(3))
        r.result["re_registered"] = len([1 for m in r.b.http_log if m[1] == "/api/v1/register_tool"]) - regs
        r.result["client_close_frame"] = [[e["code"], e["reason"]] for e in r.b.rec.events if e.get("frame") == "close" and e["dir"] == "c2s"]
        r.result["log"] = [l for l in r.log().splitlines() if "WebSocket" in l][-5:]
    f.__name__ = "close_by_server_" + label
    f.__doc__ = "Server ends the connection (%s): close handshake, reconnect delay, re-registration, next call." % label
    S[f.__name__] = (f, None)


for c, l in ((1000, "1000"), (1001, "1001"), (1008, "1008"), (1011, "1011"), (1012, "1012"), (4001, "4001"), (None, "no_code"), (0, "tcp_abort"), (0, "tcp_fin")):
    _close_sc(c, l)


@sc()
async def close_mid_call(r):
    """Connection is lost while a 2 s tool runs: what happens to the result?"""
    await r.client(SLOW + ECHO)
    ws = await r.b.next_ws(10)
    await ws.request("lost", "slow", {"s": 2, "tag": "lost"})
    await asyncio.sleep(0.3)
    t = time.monotonic()
    ws.abort()
    ws2 = await r.b.next_ws(10)
    r.result["reconnected_after_s"] = round(time.monotonic() - t, 2) if ws2 else None
    if ws2:
        m = await ws2.recv(3)
        r.result["result_replayed_on_new_connection"] = js(m)
        await ws2.request("again", "echo", {"text": 1})
        r.result["next_call"] = js(await ws2.recv(3))
    r.result["log"] = [l for l in r.log().splitlines() if "INFO" in l or "ERROR" in l][-8:]


@sc()
async def ws_server_down_after_registration(r):
    """Registration works, then the server stops listening before start(): rate of connection attempts over 5 s."""
    r.b.quiet_ws_attempts = True
    base = r.b.default_http

    async def h(m, t, hd, b):
        return await base(m, t, hd, b)
    r.b.http_handler = h
    await r.client(ECHO + '\nimport time\nprint("REGISTERED", flush=True)\ntime.sleep(2)\n')
    await r.wait_registered(1)
    await asyncio.sleep(0.3)
    await r.b.stop_listening()
    await asyncio.sleep(7)
    log = r.log()
    n = log.count("Connecting to:")
    r.result["connection_attempts_in_about_5s"] = n
    r.result["log_bytes"] = len(log)
    port = r.b.port
    r.note("server listens again on the same port")
    await r.b.start(port)
    ws = await r.b.next_ws(10)
    r.result["recovers"] = ws is not None
    if ws:
        await ws.request("q", "echo", {"text": "x"})
        r.result["response"] = js(await ws.recv(3))


def _reject_sc(status, hdrs=None):
    async def f(r):
        r.b.quiet_ws_attempts = True
        r.b.accept_ws = status
        r.b.ws_reject_headers = hdrs or {}
        await r.client(ECHO)
        await r.wait_registered(1)
        await asyncio.sleep(4)
        r.result["handshake_attempts_in_about_4s"] = r.b.ws_attempts
        r.b.accept_ws = True
        ws = await r.b.next_ws(8)
        r.result["recovers"] = ws is not None
        r.result["log"] = [l for l in r.log().splitlines() if "rror" in l][:3]
    f.__name__ = "ws_handshake_%d" % status
    f.__doc__ = "Websocket handshake answered with HTTP %d for 4 s, then accepted." % status
    S[f.__name__] = (f, None)


for st in (401, 403, 404, 429, 500, 503):
    _reject_sc(st, {"Retry-After": "30"} if st in (429, 503) else None)


@sc()
async def ws_handshake_302(r):
    """Websocket handshake answered with a redirect."""
    r.b.quiet_ws_attempts = True
    r.b.accept_ws = 302
    r.b.ws_reject_headers = {"Location": "/ws/elsewhere/"}
    await r.client(ECHO)
    await r.wait_registered(1)
    await asyncio.sleep(2)
    r.result["targets"] = [e["target"] for e in r.b.rec.events if e.get("frame") == "handshake"]
    r.result["attempts"] = r.b.ws_attempts


# ---------------------------------------------------------------- tools that misbehave
BAD = T("bad", ["k"], ["k"]) + '''
def bad(**kwargs):
    import os, sys, signal, threading, time
    k = kwargs.get("k")
    if k == "sysexit": sys.exit(3)
    if k == "sysexit0": sys.exit()
    if k == "kbd": raise KeyboardInterrupt
    if k == "osexit": os._exit(7)
    if k == "abort": os.abort()
    if k == "killself": os.kill(os.getpid(), signal.SIGTERM)
    if k == "sigint_main": signal.raise_signal(signal.SIGINT); time.sleep(0.1); return "after sigint"
    if k == "segv":
        import ctypes; ctypes.string_at(0)
    if k == "close_fds":
        os.closerange(3, 64); return "closed fds"
    if k == "print": print("tool printed this"); return "printed"
    if k == "stop": client.stop(); return "stopped"
    if k == "delmod": sys.modules.clear(); return "cleared"
    return "sample"
'''


def _bad_sc(k, doc):
    async def f(r):
        await r.client(BAD + ECHO)
        ws = await r.b.next_ws(10)
        await ws.request("bad", "bad", {"k": k})
        r.result["response"] = js(await ws.recv(2))
        r.result["exit"] = await r.wait_exit(0.5)
        ws2 = await r.b.next_ws(7) if r.result["exit"] is None else None
        r.result["new_connection"] = ws2 is not None
        for w in [x for x in (ws2 or ws,) if x is not None and not x.closed.is_set()]:
            await w.request("next", "echo", {"text": "x"})
            r.result["next_call"] = js(await w.recv(2))
        r.result.setdefault("next_call", None)
        r.result["process_alive"] = r.proc.returncode is None
    f.__name__ = "bad_tool_" + k
    f.__doc__ = doc
    S[f.__name__] = (f, None)


_bad_sc("sysexit", "Tool calls sys.exit(3).")
_bad_sc("sysexit0", "Tool calls sys.exit().")
_bad_sc("kbd", "Tool raises KeyboardInterrupt.")
_bad_sc("osexit", "Tool calls os._exit(7).")
_bad_sc("abort", "Tool calls os.abort().")
_bad_sc("killself", "Tool sends SIGTERM to its own process.")
_bad_sc("sigint_main", "Tool raises SIGINT in the process (what Ctrl-C does).")
_bad_sc("segv", "Tool dereferences a null pointer through ctypes.")
_bad_sc("close_fds", "Tool closes file descriptors 3..63 (the socket among them).")
_bad_sc("print", "Tool writes to stdout.")
_bad_sc("stop", "Tool calls client.stop().")
_bad_sc("delmod", "Tool empties sys.modules.")


# ---------------------------------------------------------------- stop and signals
@sc()
async def stop_sigint(r):
    """SIGINT (Ctrl-C) to an idle client."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    await asyncio.sleep(0.5)
    r.note("SIGINT sent")
    t = time.monotonic()
    r.proc.send_signal(signal.SIGINT)
    r.result["exit"] = await r.wait_exit(8)
    r.result["seconds"] = round(time.monotonic() - t, 1)
    ws2 = await r.b.next_ws(1)
    r.result["reconnected_after_stop"] = ws2 is not None
    r.result["close_frames"] = [[e["code"], e["reason"]] for e in r.b.rec.events if e.get("frame") == "close" and e["dir"] == "c2s"]


@sc()
async def stop_sigterm(r):
    """SIGTERM to an idle client."""
    await r.client(ECHO)
    ws = await r.b.next_ws(10)
    await asyncio.sleep(0.3)
    r.proc.send_signal(signal.SIGTERM)
    r.result["exit"] = await r.wait_exit(8)


@sc()
async def stop_from_other_thread(r):
    """A thread calls client.stop() one second after start(): does start() return, does the connection stay closed?"""
    await r.client(ECHO + '''
import threading, time
def later():
    time.sleep(1.0)
    print("calling stop", flush=True)
    client.stop()
    print("stop returned", flush=True)
threading.Thread(target=later, daemon=True).start()
''', start='client.start()\nprint("start returned", flush=True)\n')
    ws = await r.b.next_ws(10)
    r.result["exit_within_16s"] = await r.wait_exit(16)
    r.result["connections"] = r.b.ws_attempts
    r.result["stop_returned"] = "stop returned" in r.log()
    r.result["start_returned"] = "start returned" in r.log()
    r.result["close_frames"] = [[e["code"], e["reason"]] for e in r.b.rec.events if e.get("frame") == "close" and e["dir"] == "c2s"]


@sc()
async def start_blocks(r):
    """Does start() return? (the seed shows code after it)"""
    await r.client(ECHO, start='client.start()\nprint("start returned", flush=True)\n')
    await r.b.next_ws(10)
    await asyncio.sleep(3)
    r.result["start_returned"] = "start returned" in r.log()


@sc()
async def stop_before_start(r):
    """stop() before start()."""
    await r.client(ECHO, start='client.stop()\nprint("stop returned", flush=True)\n')
    r.result["exit"] = await r.wait_exit(8)
    r.result["log_tail"] = r.log().splitlines()[-2:]


@sc()
async def base_url_forms(r):
    """base_url with trailing slashes, a path, and no scheme."""
    await r.client('''
import threading
B = os.environ["ATP_BASE_URL"]
for u in (B + "///", B + "/prefix/", B.replace("http://", "")):
    try:
        c = ToolKitClient(api_key="K/ey with space?x", app_name="oracle_app", base_url=u%s)
        c.register_tool("t", [], [], "d", None, None, None)(os.getcwd.__class__ and (lambda **k: 1))
        print("REG-OK", flush=True)
    except BaseException as e:
        print("REG-RAISED", type(e).__name__, e, flush=True)
        continue
    threading.Thread(target=c.start, daemon=True).start()
''' % __import__("harness").ctor_for(r.sdk), start="import time\ntime.sleep(4)\n")
    await asyncio.sleep(4)
    r.result["targets"] = [e["target"] for e in r.b.rec.events if e.get("frame") == "handshake"]
    r.result["register_targets"] = [m[1] for m in r.b.http_log]
    r.result["printed"] = [l for l in r.log().splitlines() if l.startswith("REG")]


@sc()
async def seed_import_path(r):
    """The seed's Quick Start imports atp_sdk.atp_sdk.clients: does that exist?"""
    await r.client("from atp_sdk.atp_sdk.clients import ToolKitClient\n", raw=True)
    r.result["exit"] = await r.wait_exit(5)
    r.result["log_tail"] = r.log().splitlines()[-1:]


@sc()
async def two_clients_one_process(r):
    """Two ToolKitClient objects, started in two threads."""
    await r.client('''
import threading
c2 = ToolKitClient(api_key="KEY2", app_name="app2", base_url=os.environ["ATP_BASE_URL"]%s)
@client.register_tool("one", [], [], "d", None, None, None)
def one(**kw): return 1
@c2.register_tool("two", [], [], "d", None, None, None)
def two(**kw): return 2
threading.Thread(target=c2.start, daemon=True).start()
''' % __import__("harness").ctor_for(r.sdk))
    ws1 = await r.b.next_ws(10)
    ws2 = await r.b.next_ws(10)
    r.result["paths"] = sorted([ws1.path, ws2.path]) if ws2 else None
    await ws1.request("q", "one")
    await ws2.request("q", "two")
    r.result["a"] = [ws1.path, js(await ws1.recv(1))]
    r.result["b"] = [ws2.path, js(await ws2.recv(1))]
