"""What identifies an owner or opens a door is taken out of a text; the same thing gets the same placeholder everywhere. Pure.

It would rather take out too much than too little: who reads a bundle needs numbers and sentences, not names.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote

from cluster.yamlfile import SECRET_NAME

SECRET = "(secret)"  # noqa: S105 - what stands in its place

# Names beside those of inventory.is_secret whose values are nobody's business.
_PRIVATE = rf"{SECRET_NAME.pattern}|SERIAL|SSID|GUID|AUTHORIZATION|COOKIE|CREDENTIAL|PWD|PSK"
# What contains such a word by chance, and what counts tokens in the sense of language models.
_HARMLESS = re.compile(r"(?:.*\.)?(?:KeyError|keywords?|tokeniz\w*|passed|passes|bypass\w*)", re.IGNORECASE)
_COUNT = re.compile(
    r"(?:.*[_.-])?(?:tokens(?:_per_s(?:econd)?)?|token_accuracy|(?:eos|bos|pad)_token_id)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?(?:e[+-]?\d{1,3})?(?![\w.])")
# Accounts that many machines have, and names of nodes that tell nothing.
_NOBODY = frozenset(("root", "nobody", "user", "admin", "ubuntu", "nvidia", "dgx", "spark", "localhost", "localdomain"))
_NOBODY |= {"left", "right", "head", "peer", "broadcasthost"}

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours, which would part a word from itself
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_PUBLIC_KEY = re.compile(r"(?:\b(?:ssh|ecdsa|sk)-[\w@.-]{1,60} {1,3})?\bAAAA[0-9A-Za-z+/]{16,}={0,2}(?: +[^\s\"']+)?")
_FINGERPRINT = re.compile(r"\bSHA256:[A-Za-z0-9+/]{20,}=?|\bMD5:(?:[0-9a-f]{2}:){15}[0-9a-f]{2}")
_TOKEN = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|nvapi-|ya29\.|eyJ)[\w.-]{8,}")
_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_BEARER = re.compile(r"\b(bearer|basic|digest) +[\w.~+/=-]{6,}", re.IGNORECASE)
_OPTION = re.compile(
    r"(?<![\w-])(--?[\w-]{0,60}?(?:token|key|secret|pass)[\w-]{0,60})([ =]{1,3})(?!-)\S+", re.IGNORECASE
)
_SETTING = re.compile(
    rf"((?:{_PRIVATE})[\w.-]{{0,60}})"  # the end of a name
    r"(?:(\\?[\"']?[ \t]{0,3}[=:][ \t]{0,3}|\\?[\"'][ \t]{0,3},[ \t]{0,3})(\\?[\"'])((?:(?!\3)[^\n])*)"  # in quotes
    r"|(\\?[\"']?[ \t]{0,3}=[ \t]{0,3}|\\?[\"'][ \t]{0,3}:[ \t]{0,3})([^\s,;&}\])\"']+)"  # a word
    r"|([ \t]{0,3}:[ \t]{0,3})([^\n]+))",  # the rest of the line
    re.IGNORECASE,
)
_BEGINNING = re.compile(r"[\w.-]*\Z")
_ACCOUNT = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?!\S{0,80}\.(?:service|socket|timer|slice|target|mount)\b)[\w.:-]{1,253}"
)
_HOME = re.compile(r"(?<=/home/)[^/\s:\"',;)\]]+|(?<=/Users/)[^/\s:\"',;)\]]+")
_LOCAL_NAME = re.compile(
    r"(?<![\w./-])[A-Za-z0-9][\w-]{0,62}(?:\.[\w-]{1,63}){0,6}"
    r"\.(?:local|localdomain|lan|home|internal|corp|intranet|box|arpa|ts\.net)\b(?!\w)"
)
_UUID = re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.IGNORECASE)
_MAC = re.compile(
    r"(?<![0-9a-f:-])(?:[0-9a-f]{2}([:-]))(?:[0-9a-f]{2}\1){4,18}[0-9a-f]{2}(?![0-9a-f:-])"
    r"|\b[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}\b|(?<=\benx)[0-9a-f]{12}\b",
    re.IGNORECASE,
)
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}(?:[0-9a-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])", re.IGNORECASE
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_GUID = re.compile(r"\b0x(?!0000)[0-9a-f]{16}\b|(?<![\w:])(?:[0-9a-f]{4}:){3}[0-9a-f]{4}(?![\w:])", re.IGNORECASE)
_SERIAL = re.compile(r"\b((?:serial|s/n|asset tag|service tag)\b[^\n:=#]{0,20}[:=#]\s{0,8})\S+", re.IGNORECASE)
_HEX = re.compile(r"\b[0-9a-f]{32,}\b", re.IGNORECASE)
_BLOB = re.compile(r"(?<![\w+-])(?=[\w+-]*\d)(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])[\w+-]{40,}={0,2}")


class Redactor:
    """Takes out what it knows by name, and what can be known by its form.

    Args:
        secrets: values that stand nowhere.
        names: what is known by name, with its placeholder: host names, users, serial numbers. Case does not matter.
        homes: home folders, which may have spaces in their names.
    """

    def __init__(self, *, secrets: Iterable[str] = (), names: Mapping[str, str], homes: Iterable[str] = ()) -> None:
        each = [form for secret in secrets for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))]
        self._secrets = _any_of((secret for secret in each if len(secret) > 3), whole=False)
        self._short_secrets = _any_of((secret for secret in each if len(secret) <= 3), whole=True)
        self._homes = _any_of((home for home in homes if home.count("/") > 1), whole=True)
        self._names = {
            name.casefold(): kind for name, kind in names.items() if len(name) > 1 and name.casefold() not in _NOBODY
        }
        self._named = _any_of(self._names, whole=True)
        self._placeholders: dict[tuple[str, str], str] = {}

    def placeholder(self, kind: str, value: str) -> str:
        """`kind-1`, `kind-2`: the same for the same value."""
        known = self._placeholders.get((kind, value.casefold()))
        if known is None:
            taken = {placeholder for placeholder in self._names.values() if placeholder.startswith(f"{kind}-")}
            count = len(taken) + sum(1 for one, _ in self._placeholders if one == kind) + 1
            known = self._placeholders[kind, value.casefold()] = f"{kind}-{count}"
        return known

    def text(self, text: str) -> str:
        """The text without what is private."""
        text = _ESCAPES.sub("", text)
        text = self._short_secrets.sub(SECRET, self._secrets.sub(SECRET, text))
        for pattern, instead in (
            (_PEM, "(key)"),
            (_PUBLIC_KEY, "(public key)"),
            (_FINGERPRINT, "(fingerprint)"),
            (_TOKEN, SECRET),
            (_USERINFO, SECRET),
            (_BEARER, rf"\1 {SECRET}"),
            (_OPTION, rf"\1\2{SECRET}"),
            (_SERIAL, r"\1(serial)"),
        ):
            text = pattern.sub(instead, text)
        text = _SETTING.sub(_without_value, text)
        text = self._homes.sub("/home/user", text)
        text = _ACCOUNT.sub(self._kind("account"), text)
        text = self._named.sub(lambda found: self._names[found[0].casefold()], text)
        text = _LOCAL_NAME.sub(lambda found: self._known(found[0]) or self.placeholder("host", found[0]), text)
        text = _HOME.sub(lambda found: self._known(found[0]) or self.placeholder("user", found[0]), text)
        text = _UUID.sub(self._kind("uuid"), text)
        text = _MAC.sub(lambda found: self.placeholder("mac", re.sub(r"[:.-]", "", found[0])), text)
        text = _IPV6.sub(self._address, text)
        text = _IPV4.sub(self._address, text)
        text = _GUID.sub(self._kind("guid"), text)
        text = _HEX.sub(self._kind("hex"), text)
        return _BLOB.sub("(blob)", text)

    def _kind(self, kind: str) -> Callable[[re.Match[str]], str]:
        return lambda found: self.placeholder(kind, found[0])

    def _known(self, text: str) -> str | None:
        """The placeholder that a name begins with already."""
        first = re.match(r"(?:user|host|node|id)-\d+\b|user\Z", text)
        return first[0] if first else None

    def _address(self, found: re.Match[str]) -> str:
        """An IP address: kept if it is of a private range and hides no MAC."""
        try:
            address = ipaddress.ip_address(found[0])
        except ValueError:
            return found[0]
        plain = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped else address
        if isinstance(plain, ipaddress.IPv4Address):
            ours = plain.is_private or plain.is_link_local or plain.is_loopback or plain.is_multicast
        else:
            ours = plain.is_loopback or plain.is_unspecified  # the others may be made of a MAC
        return found[0] if ours else self.placeholder("ip", str(plain))


def _without_value(found: re.Match[str]) -> str:
    """`NAME=value`, `"NAME": "value"`, `NAME: value to the end of the line`, without the value."""
    beginning = _BEGINNING.search(found.string, max(0, found.start() - 60), found.start())
    name = (beginning[0] if beginning else "") + found[1]
    value = next(part for part in (found[4], found[6], found[8]) if part is not None)
    if _HARMLESS.fullmatch(name) or (_COUNT.fullmatch(name) and _NUMBER.match(value)):
        return found[0]
    return f"{found[1]}{found[2] or found[5] or found[7]}{found[3] or ''}{SECRET}"


def _any_of(words: Iterable[str], *, whole: bool) -> re.Pattern[str]:
    """A pattern for each of the words, the longest first; as whole words, or wherever they stand."""
    each = sorted({word for word in words if word.strip()}, key=lambda word: (-len(word), word))
    if not each:
        return re.compile(r"(?!)")
    union = "|".join(map(re.escape, each))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{union})(?![A-Za-z0-9])" if whole else union, re.IGNORECASE)
