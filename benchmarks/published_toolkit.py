"""The toolkit that the published SDK serves: `python published_toolkit.py URL`."""

import logging
import sys

import work  # beside this file
from atp_sdk.clients import ToolKitClient

logging.disable(logging.CRITICAL)
client = ToolKitClient(api_key="benchmark", app_name="published", base_url=sys.argv[1])


@client.register_tool("echo", ["value"], [], "d", None, None, None)
def echo(value=None, **_):
    return work.echo(value)


@client.register_tool("sleep", ["seconds"], [], "d", None, None, None)
def sleep(seconds=0.0, **_):
    return work.sleep(seconds)


@client.register_tool("cpu", ["seconds"], [], "d", None, None, None)
def cpu(seconds=0.0, **_):
    return work.cpu(seconds)


client.start()
