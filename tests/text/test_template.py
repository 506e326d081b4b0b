"""The renderer against transformers' own; templates that reach out, grow or never end are stopped."""

from __future__ import annotations

import datetime
import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.text.helpers import ODD, TOOLS, calling, talk, template
from trivium.core.errors import DataError
from trivium.text import template as renderer
from trivium.text.template import MAX_SOURCE, Rendered, render

NOW = datetime.datetime(2025, 6, 30, 12, 34, 56)
VALUES: dict[str, Any] = {"messages": talk("hi", ODD, "<b>&'\"</b>"), "tools": TOOLS, "bos_token": "<s>", "n": 3, "nothing": None}

# fmt: off
# ruff: noqa: E501
SAME = [
    "{% for m in messages %}\n  {% if loop.first %}\n    {{ m.role }}\n  {% endif %}\n{{ m.content }}\n{% endfor %}\n",
    "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ tools[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set ns = namespace(a=1, b='x') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% set ns.b = ns.b ~ m.role %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% macro show(m, n=2) %}[{{ m.role|upper }}{{ n }}{{ caller() if caller }}]{% endmacro %}{{ show(messages[0]) }}{% call show(messages[1], n=3) %}c{% endcall %}",
    "{{ messages|map(attribute='role')|join(', ') }} {{ messages|selectattr('role', 'eq', 'user')|list|length }} {{ messages|map('length')|sum }}",
    "{{ messages[::-1][0].content[1:3] }} {{ messages|length - 1 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ -n }} {{ 'ab' * n }} {{ '%s-%03d' % ('a', 7) }}",
    "{{ 'a,b'.split(',') }} {{ ' x '.strip() }} {{ 'aXbX'.replace('X', '--') }} {{ 'x'.join(['a', 'b']) }} {{ '{:>5}|{}'.format(1, 'b') }} {{ 'x'.center(5) }}",
    "{{ '**%s** in 2024, 99999999999 of %d%%' % ('a', 7) }} {{ '{{\"a\": {}, 99999999999}}'.format(5) }} {{ '%(k)-4s|' % {'k': 'v'} }}",
    "{{ [1, 'a', (2, 3), {'k': none}] }} {{ {'a': 1}.items()|list }} {{ dict(a=1, b=2) }} {{ tools[0].function.get('absent', 'd') }}",
    "{{ 'some long text here'|wordwrap(8) }} {{ 'a\nb'|indent(2) }} {{ 'x'|center(9) }} {{ [3, 1, 2]|sort }} {{ 3.14159|round(2) }} {{ '%d'|format(3) }}",
    "{{ nothing is none }} {{ absent is defined }} {{ absent }} {{ n is number and tools is iterable }} {{ 'a' in messages[0] }} {{ absent|default('d') }}",
    "{% filter upper %}abc{{ bos_token }}{% endfilter %}{% set block %}x{{ n }}y{% endset %}{{ block|trim }} {{ strftime_now('%d %b %Y') }}",
    "{% for k, v in tools[0].function.items() recursive %}{{ k }}{% if v is mapping %}({{ loop(v.items()) }}){% endif %}{% endfor %}",
    "{% if tools %}{{- '\n' -}}{% endif %}  {%- generation %}g{{ n }}{% endgeneration %} {#- note #} end {{ 'é' | e }} {{ '<x>' | safe }}",
    "{{ [4, 5]|batch(1)|list }} {{ 'abc'|first }}{{ 'abc'|last }} {{ 'a b'|title }} {{ [1, 1, 2]|unique|list }} {{ ['b', 'a']|reverse|list }} {{ '5'|int + 1 }}",
]

EVIL = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops in a block": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endset %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "recursive loops": "{% for x in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "long range": "{{ range(10 ** 9)|list }}",
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{{ [1] * 10 ** 11 }}",
    "left multiplied": "{{ 10 ** 10 * 'a' }}",
    "doubled by plus": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by tilde": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested objects": "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "compared lists": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "great power": "{{ 10 ** (10 ** 10) }}",
    "power tower": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "width by %": "{{ '%10000000000d' % 1 }}",
    "computed width by %": "{{ '%*d' % (10 ** 10, 1) }}",
    "width by format": "{{ '{:10000000000d}'.format(1) }}",
    "nested width by format": "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "width by the filter": "{{ '%10000000000d'|format(1) }}",
    "many places": "{% set x = 'a' * 10 ** 6 %}{{ ('%(x)s' * 10 ** 5) % {'x': x} }}",
    "width by ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "width by center": "{{ 'a'|center(10 ** 10) }}",
    "replaced by long text": "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 5) }}",
    "replaced by the filter": "{{ ('a' * 10 ** 5)|replace('a', 'b' * 10 ** 5) }}",
    "joined by long text": "{{ (('b' * 10 ** 6)).join('a' * 10 ** 6) }}",
    "joined by the filter": "{{ range(99999)|join('b' * 10 ** 6) }}",
    "wrapped by long text": "{{ ('a ' * 10 ** 5)|wordwrap(1, wrapstring='b' * 10 ** 6) }}",
    "indented by long text": "{{ ('a\\n' * 10 ** 5)|indent('b' * 10 ** 6) }}",
    "many long texts": "{{ range(99999)|map('string')|map('center', 60000)|list|length }}",
    "many slices": "{% set b = 'a' * 10 ** 6 %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [b[1:]] %}{% endfor %}",
    "slices on a stack": "{% macro f(s) %}{{ f(s[1:]) }}{% endmacro %}{{ f('a' * 10 ** 7) }}",
    "long output": "{% for i in range(99999) %}" + "y" * 1000 + "{% endfor %}",
    "long block": "{% set x %}{% for i in range(99999) %}" + "y" * 1000 + "{% endfor %}{% endset %}",
    "summed lists": "{{ range(99999)|map('list')|sum(start=[]) }}",
    "rounded far": "{{ 1.5|round(10 ** 9) }}",
    "deep JSON": "{{ messages|tojson(indent=10 ** 9) }}",
    "bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "encoded": "{{ 'a'.encode() }}",
    "tabs": "{{ 'a\\t'.expandtabs(10 ** 10) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by item": "{{ ''['__class__'] }}",
    "classes by filter": "{{ ''|attr('__class__') }}",
    "classes by map": "{{ ['']|map(attribute='__class__')|list }}",
    "classes by format": "{{ '{0.__class__}'.format(1) }}",
    "classes by a kept format": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "the template itself": "{{ self._TemplateReference__context }}",
    "the environment": "{{ strftime_now.__self__ }}",
    "names on a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "changed input": "{{ messages.append(1) }}",
    "changed object": "{{ messages[0].update({'role': 'system'}) }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep attributes": "{{ a" + ".a" * 40000 + " }}",
    "deep sums": "{{ 1" + "+1" * 40000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "too long": "a" * (MAX_SOURCE + 1),
    "not well formed": "{% for %}",
    "an unknown filter": "{{ messages|random }}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "arithmetic": "{{ 1 / 0 }}",
}
# fmt: on


@pytest.mark.parametrize("source", SAME)
def test_output_equals_transformers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(NOW.year, NOW.month, NOW.day, NOW.hour, NOW.minute, NOW.second)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    other = chat_template_utils._compile_jinja_template(source).render(**VALUES)
    assert render(source, VALUES, date=NOW).text == other
    assert other.strip()


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3", "deepseek_v3"])
def test_real_templates_equal_transformers(name: str) -> None:
    for messages in (talk("hi"), talk(ODD, "x", ODD, system="S"), calling(content="")):
        values = {"messages": messages, "tools": TOOLS, "add_generation_prompt": True, "bos_token": "<s>"}
        try:
            other = chat_template_utils._compile_jinja_template(template(name)).render(**values)
        except Exception:
            with pytest.raises(DataError):
                render(template(name), values, date=NOW)
        else:
            assert render(template(name), values, date=NOW).text == other


@pytest.mark.slow
@pytest.mark.parametrize("name", EVIL)
def test_hostile_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.3)
    start = time.thread_time()
    with pytest.raises(DataError, match="chat template") as caught:
        render(EVIL[name], VALUES, date=NOW)
    assert time.thread_time() - start < 3
    assert len(str(caught.value)) < 700


@pytest.mark.slow
def test_hostile_templates_take_little_memory() -> None:
    for name in ("doubled by plus", "many long texts", "slices on a stack", "joined by long text"):
        tracemalloc.start()
        with pytest.raises(DataError):
            render(EVIL[name], VALUES, date=NOW)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400e6, f"{name}: {peak / 1e6:.0f} MB"


def test_what_stopped_a_template_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert renderer.MAX_SECONDS == 2
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.3)
    for name, words in {
        "loops": "ran for more than 0.3 seconds",
        "classes": "reaches for what no template may have: the attribute '__class__' of a str",
        "multiplied text": "more text than",
        "endless recursion": "calls itself without an end",
        "not well formed": "not well formed: line 1",
        "its own error": "cannot write this conversation: roles must alternate",
        "too long": "at most 131072",
    }.items():
        with pytest.raises(DataError, match=words):
            render(EVIL[name], VALUES, date=NOW)


def test_large_conversations_are_no_attack() -> None:
    long = talk(*["word " * 2000 for _ in range(400)])  # four million characters
    for name in ("llama3", "qwen3", "deepseek_v3"):
        assert len(render(template(name), {"messages": long, "bos_token": ""}, date=NOW).text) > 4_000_000 - 400


def test_generation_marks_become_spans() -> None:
    source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    rendered = render(source, {"messages": talk("ab", "é👩")}, date=NOW)
    assert rendered == Rendered("user:ab;assistant:é👩;", ((5, 7), (18, 20)))
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["ab", "é👩"]


def test_each_rendering_has_limits_of_its_own() -> None:
    source = "{{ 'a' * 10 ** 7 }}"
    assert all(len(render(source, {}, date=NOW).text) == 10**7 for _ in range(20))
