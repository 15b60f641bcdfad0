"""Conversations: their tokens are those of the model's chat template, and the page offers them if there is one."""

from __future__ import annotations

TURNS = [{"role": "user", "content": "from path"}, {"role": "assistant", "content": "open"}]
FIRST, BOTH = ["class", "from", "path", "self"], ["class", "from", "path", "self", "open"]


def words(tokens):
    return [token["text"].strip() for token in tokens]


def test_the_tokens_are_the_templates_and_an_assistants_last_turn_goes_on(trained):
    assert trained.client.json("GET", "/api/status")["model"]["chats"] is True
    for turns, expected in ((TURNS[:1], FIRST), (TURNS, BOTH)):
        found = trained.client.json("POST", "/api/activations", {"messages": turns})
        assert words(found["tokens"]) == expected
    chat, text = ({"a": [one], "b": ["yield"]} for one in (TURNS, "class from path self open"))
    contrasts = [trained.client.json("POST", "/api/contrast", body)["latents"] for body in (chat, text)]
    assert {row["latent"] for row in contrasts[0]} & {row["latent"] for row in contrasts[1]}


def test_a_chat_is_steered_and_has_a_curve(trained):
    edit = {"sae": "topk", "latent": 3, "strength": 5.0}
    body = {"prompt": TURNS, "sampling": {"max_new_tokens": 2}}
    events = trained.client.events("/api/steer", body | {"edits": [edit]})
    (start,) = [content for kind, content in events if kind == "start"]
    assert [text.strip() for text in start["tokens"]] == BOTH
    events = trained.client.events("/api/steer/curve", body | {"edit": edit, "strengths": [1.0], "random_latents": 0})
    assert events[-1][0] == "done"
    assert events[-1][1]["texts"][0]["prompt"].split() == BOTH


def test_what_the_template_refuses_is_said(trained, scope):
    body = {"messages": [{"role": "system", "content": "self"}]}
    error = trained.client.json("POST", "/api/activations", body, status=422)["error"]
    assert "no turn of system" in error
    assert scope.client.json("GET", "/api/status")["model"]["chats"] is False


def test_the_page_takes_turns_and_its_address_holds_them(open_page, trained, expect):
    page = open_page(trained)
    page.goto("/#page=text")
    page.get_by_role("button", name="Chat").first.click()
    page.get_by_label("Turn 1", exact=True).first.fill("from path")
    page.get_by_role("button", name="Add a turn").first.click()
    expect(page.get_by_label("Role of turn 2").first).to_have_value("assistant")
    page.get_by_label("Turn 2", exact=True).first.fill("open")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".tokens-of-text button")).to_have_text([word + " " for word in BOTH])
    shared = page.url
    page.get_by_role("button", name="Remove this turn").nth(1).click()
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".tokens-of-text button")).to_have_count(len(FIRST))
    page.goto("/#page=notes")
    page.goto(shared)
    expect(page.locator(".tokens-of-text button")).to_have_count(len(BOTH))
    page.goto(shared.replace("page=text", "page=steer").replace("text_turn", "prompt_turn") + "&max_new_tokens=2")
    page.get_by_role("button", name="Steer", exact=True).click()
    expect(page.locator("main [role=status]").first).to_have_text("Done.")


def test_the_page_says_if_there_is_no_template(open_page, scope, expect):
    page = open_page(scope)
    page.goto("/#page=steer")
    expect(page.locator(".kinds")).to_have_text("Plain text only: this model's tokenizer has no chat template.")
