"""Tools that use a person's token: it arrives with each call, as `auth_token`.

A jail reaches the hosts that are named for it: `--allow api.hubapi.com`; without that, their calls
end as `tool_error` and say so. With `--inject hubspot=api.hubapi.com` besides, the token never
enters the jail. `whose_token` shows, without any network, that the token arrived.
"""

import hashlib

import requests
from atp_sdk.atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="YOUR_ATP_API_KEY", app_name="my_app")


@client.register_tool(
    function_name="create_company",
    params=["name", "domain", "industry"],
    required_params=["name", "domain", "industry"],
    description="Creates a company in HubSpot.",
    auth_provider="hubspot",
    auth_type="OAuth2",
    auth_with="access_token",
)
def create_company(**kwargs):
    access_token = kwargs.get("auth_token")
    url = "https://api.hubapi.com/crm/v3/objects/companies"
    headers = {"Authorization": f"Bearer {access_token}", "Content-Type": "application/json"}
    data = {
        "properties": {
            "name": kwargs.get("name"),
            "domain": kwargs.get("domain"),
            "industry": kwargs.get("industry"),
        }
    }
    response = requests.post(url, json=data, headers=headers)
    return response.json()


@client.register_tool(
    function_name="get_contacts",
    params=["auth_token"],
    required_params=["auth_token"],
    description="Fetches contacts from HubSpot.",
    auth_provider="hubspot",
    auth_type="OAuth2",
    auth_with="access_token",
)
def get_contacts(**kwargs):
    access_token = kwargs.get("auth_token")
    url = "https://api.hubapi.com/crm/v3/objects/contacts"
    headers = {"Authorization": f"Bearer {access_token}"}
    response = requests.get(url, headers=headers)
    return response.json()


@client.register_tool(
    function_name="whose_token",
    params=[],
    required_params=[],
    description="Tells which token arrived, by its SHA-256.",
    auth_provider="hubspot",
    auth_type="OAuth2",
    auth_with="access_token",
)
def whose_token(**kwargs):
    return {"sha256": hashlib.sha256(kwargs["auth_token"].encode()).hexdigest()}


client.start()
