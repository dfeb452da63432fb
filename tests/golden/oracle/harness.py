"""Runs a toolkit script against fake_backend with a given executable and gives a transcript."""
import asyncio
import json
import os
import re
import signal
import textwrap
import time

HEADER = '''\
import os
from atp_sdk.clients import ToolKitClient
{extra_imports}
client = ToolKitClient(api_key="TESTKEY", app_name="oracle_app", base_url=os.environ["ATP_BASE_URL"]{ctor})
'''


def ctor_for(sdk, proto="ws"):
    v = tuple(int(x) for x in sdk.split("-")[0].split("."))
    if v < (0, 1, 5):
        return ""
    if v < (0, 1, 6):
        return ", auto_restart=False"
    return ', protocol="%s", auto_restart=False' % proto


class Run:
    def __init__(self, name, sdk, python, tmp, env=None):
        self.name, self.sdk = name, sdk
        self.python = python
        self.env_extra = env or {}
        self.b = None
        self.proc = None
        self.source = None
        self.notes = []
        self.result = {}
        self.doc = ""
        self.logf = None
        self.tmp = str(tmp)

    # -- the client process ----------------------------------------------
    async def client(self, body, proto="ws", extra_imports="", raw=False, start="client.start()\n",
                     base=None, ctor=None):
        src = textwrap.dedent(body) if raw else (
            HEADER.format(extra_imports=extra_imports, ctor=ctor_for(self.sdk, proto) if ctor is None else ctor)
            + textwrap.dedent(body) + "\n" + start)
        self.source = src
        path = os.path.join(self.tmp, "toolkit.py")
        with open(path, "w") as f:
            f.write(src)
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env.update(PYTHONUNBUFFERED="1", ATP_BASE_URL=base or self.b.url,
                   HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # no outside traffic
        env.update(self.env_extra)
        self.logf = open(os.path.join(self.tmp, "log"), "wb")
        self.proc = await asyncio.create_subprocess_exec(self.python, path, cwd=self.tmp, env=env,
                                                         stdout=self.logf, stderr=asyncio.subprocess.STDOUT,
                                                         stdin=asyncio.subprocess.DEVNULL)
        self.b.rec.add(chan="proc", note="client process started")
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self):
        rc = await self.proc.wait()
        self.b.rec.add(chan="proc", note="client process exited", returncode=rc)

    async def wait_exit(self, timeout):
        try:
            await asyncio.wait_for(asyncio.shield(self.proc.wait()), timeout)
            await asyncio.sleep(0.05)
            return self.proc.returncode
        except asyncio.TimeoutError:
            return None

    async def wait_registered(self, n, timeout=60):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if sum(1 for m in self.b.http_log if m[1] == "/api/v1/register_tool") >= n:
                return True
            await asyncio.sleep(0.02)
        return False

    def note(self, s):
        self.notes.append(s)
        self.b.rec.add(chan="note", note=s)

    def log(self):
        self.logf.flush()
        with open(os.path.join(self.tmp, "log"), "rb") as f:
            t = f.read().decode("utf-8", "replace")
        return self.clean(t)

    def clean(self, t):
        t = t.replace(self.tmp, "<tmp>")
        t = re.sub(r"(127\.0\.0\.1:|port=)%d\b" % self.b.port, r"\1<port>", t)
        t = re.sub(r"0x[0-9a-f]{6,}", "0x<addr>", t)
        t = re.sub(r"/(?:root|tmp)/[^\s\"']*?/(site-packages|python3\.\d+)/", r"<\1>/", t)
        return t

    async def finish(self):
        alive = self.proc is not None and self.proc.returncode is None
        self.result["client_alive_at_end"] = alive
        self.result["returncode_if_exited"] = None if self.proc is None else self.proc.returncode
        if alive:
            try:
                self.proc.send_signal(signal.SIGKILL)
                await self.proc.wait()
            except ProcessLookupError:
                pass
        await asyncio.sleep(0.05)

    def document(self):
        evs = [json.loads(self.clean(json.dumps(e, ensure_ascii=True, default=repr))) for e in self.b.rec.events]
        # the harness's own kill is not part of the behaviour
        log = self.log() if self.proc else ""
        return {"scenario": self.name, "sdk": self.sdk, "what": self.doc,
                "toolkit_source": self.source, "result": json.loads(self.clean(json.dumps(self.result, default=repr))), "notes": self.notes,
                "events": evs, "client_log": log.splitlines()}
