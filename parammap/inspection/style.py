"""The style and the script of the page that `parammap inspect --html` writes; both stand inside the
page."""

CSS = """
:root{color-scheme:light dark;--bg:#f4f6f8;--surface:#fff;--sunk:#eef1f4;--ink:#171c24;--muted:#566070;--line:#d5dbe2;
--embedding:#2563c9;--attention:#d4650c;--mlp:#0f8a6d;--experts:#7a4fd0;--norm:#c2255c;--other:#6b7480;
--hatch:#8a94a2;--warn:#8a4b00;--warn-bg:#fff4e0}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--surface:#181e26;--sunk:#222a34;--ink:#e8ecf1;--muted:#a0abb9;
--line:#323c48;--embedding:#6ea3ff;--attention:#f09a4a;--mlp:#3fc1a0;--experts:#b094f5;--norm:#f277a1;--other:#98a2b0;
--hatch:#76828f;--warn:#ffcf8a;--warn-bg:#33260f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1280px;margin:0 auto;padding:1.25rem clamp(.75rem,2.5vw,2rem) 5rem}
h1{font-size:1.4rem;line-height:1.2;margin:0}
h2{font-size:1.05rem;margin:0 0 .25rem}
p{margin:.15rem 0 .75rem;color:var(--muted)}
header p,dd,td small,.path{overflow-wrap:anywhere}
section{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:1rem;margin-top:1rem;min-width:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0 0}
.tiles div{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:.6rem .85rem}
.tiles dt,.tiles small{color:var(--muted);font-size:.8rem}
.tiles dd{margin:0;font-size:1.2rem;font-weight:600;line-height:1.3}
.tiles small{display:block;font-weight:400}
.missing{background:var(--warn-bg);border-color:var(--warn)}
.missing h2{color:var(--warn)}
.missing ul{margin:.25rem 0 0;padding-left:1.1rem;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;margin:.5rem 0 .75rem;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend i{width:.95rem;height:.95rem;border-radius:3px}
.embedding{background:var(--embedding)}.attention{background:var(--attention)}.mlp{background:var(--mlp)}
.experts{background:var(--experts)}.norm{background:var(--norm)}.other{background:var(--other)}
.gap{background:var(--sunk);box-shadow:inset 0 0 0 1px var(--hatch)}
.padding{background:repeating-linear-gradient(45deg,var(--hatch) 0 2px,var(--sunk) 2px 5px)}
.scroll{overflow:auto;max-height:min(70vh,46rem);border:1px solid var(--line);border-radius:8px}
.grid{border-collapse:separate;border-spacing:0;width:100%;font-size:.85rem}
.grid th,.grid td{border-bottom:1px solid var(--line);border-right:1px solid var(--line);padding:.4rem .5rem;
text-align:left;vertical-align:top;background:var(--surface)}
.grid tr>:last-child{border-right:0}.grid tbody tr:last-child>*{border-bottom:0}
.grid thead th{position:sticky;top:0;z-index:2;background:var(--sunk);font-weight:600}
.grid thead tr+tr th{top:2rem}
.grid .corner{width:1%}
.grid tbody th{position:sticky;left:0;z-index:1;background:var(--sunk);min-width:10.5rem;max-width:16rem;font-weight:400}
.grid thead .corner{left:0;z-index:3}
.grid tbody th a{font-weight:600;color:inherit}
.grid tbody th span{display:block;color:var(--muted)}
.grid td{min-width:7.4rem;white-space:nowrap}
.grid td small{color:var(--muted);font-size:.78rem}
.grid td small:first-of-type{margin-left:.6em}
.grid td small:last-child{display:block}
.mini{display:flex;height:.7rem;width:var(--w);min-width:2px;margin:.15rem 0 .3rem;border-radius:2px;overflow:hidden}
.mini i,.bar i{flex:var(--n) 0 0;min-width:0;display:block}
fieldset{border:0;padding:0;margin:0 0 .75rem;display:flex;flex-wrap:wrap;gap:.3rem}
fieldset label{position:relative;border:1px solid var(--line);border-radius:6px;padding:.25rem .65rem;font-size:.85rem;
cursor:pointer}
fieldset input{position:absolute;opacity:0}
fieldset label:has(:checked){background:var(--ink);color:var(--surface);border-color:var(--ink)}
fieldset label:has(:focus-visible),.bar:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid
var(--embedding);outline-offset:2px}
details{border-top:1px solid var(--line)}
summary{cursor:pointer;padding:.6rem 0;font-weight:600}
summary small{font-weight:400;color:var(--muted);font-size:.85rem}
.buffer{margin:0 0 1.1rem}
.buffer h3{font-size:.9rem;margin:0}
.buffer p{font-size:.82rem;margin:0 0 .4rem}
.buckets{overflow:auto;max-height:min(60vh,32rem);padding:.2rem .3rem .4rem .2rem}
.bucket{margin-bottom:.35rem;width:100%}
.bucket>span{display:block;font-size:.75rem;color:var(--muted);position:sticky;left:0;width:max-content;max-width:100%}
.bar{display:flex;height:1.5rem;width:var(--w);min-width:3px;background:var(--sunk)}
.bar .wide+i{box-shadow:inset 1px 0 0 var(--surface)}
.bar i.gap{box-shadow:inset 0 0 0 1px var(--hatch)}
.bar i:hover,.bar i.at{filter:brightness(1.25) saturate(1.2);outline:2px solid var(--ink);outline-offset:-2px}
.shards{height:5px;width:var(--w);border-right:1px solid var(--muted);
background:linear-gradient(90deg,var(--muted) 1px,transparent 1px) 0 0/calc(100%/var(--shards)) 100%}
#buffers:has(#view8:checked) .bucket{width:800%}
#buffers:has(#view64:checked) .bucket{width:6400%}
#buffers:has(#viewtiles:checked) .bar{flex-wrap:wrap;width:auto;height:auto;gap:2px;background:none}
#buffers:has(#viewtiles:checked) .bar i{flex:0 0 1rem;height:1rem;border-radius:2px}
#buffers:has(#viewtiles:checked) .bar i:not(.gap){box-shadow:none}
#buffers:has(#viewtiles:checked) .shards{display:none}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.35rem 1.25rem;margin:.5rem 0 0;font-size:.88rem}
.facts dt{color:var(--muted)}.facts dd{margin:0}
.facts dd div{max-height:16rem;overflow:auto}
#tip{position:fixed;z-index:9;pointer-events:none;max-width:min(26rem,calc(100vw - 1rem));background:var(--ink);
color:var(--surface);padding:.45rem .65rem;border-radius:6px;font-size:.82rem;white-space:pre-line;overflow-wrap:anywhere}
@media (max-width:560px){section{padding:.75rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}
.grid tbody th{min-width:6.2rem;max-width:8.5rem}.grid td{min-width:6.6rem;white-space:normal}}
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const one of document.querySelectorAll('i[title]')) { one.dataset.tip = one.title; one.removeAttribute('title'); }
function show(one, x, y) {
  tip.textContent = one.dataset.tip; tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 12, innerWidth - box.width - 8)) + 'px';
  tip.style.top = (y + box.height + 24 > innerHeight ? Math.max(8, y - box.height - 12) : y + 16) + 'px';
}
function hide() { tip.hidden = true; document.querySelector('.at')?.classList.remove('at'); }
for (const kind of ['pointermove', 'pointerdown']) addEventListener(kind, event => {
  const one = event.target.closest?.('[data-tip]');
  hide();
  if (one) show(one, event.clientX, event.clientY);
});
addEventListener('scroll', hide, {capture: true, passive: true});
addEventListener('keydown', event => {
  const bar = document.activeElement, step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (event.key === 'Escape') hide();
  if (!step || !bar.matches('.bar')) return;
  event.preventDefault();
  const old = bar.querySelector('.at'), next = old ? (step > 0 ? old.nextElementSibling : old.previousElementSibling)
    : (step > 0 ? bar.firstElementChild : bar.lastElementChild);
  if (!next) return;
  hide(); next.scrollIntoView({block: 'nearest', inline: 'nearest'}); next.classList.add('at');
  const box = next.getBoundingClientRect(); show(next, box.left, box.bottom);
});
addEventListener('focusout', hide);
"""
