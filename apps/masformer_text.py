"""The MASFormer page's own document: a story without digits, long enough to lose a number in."""

from __future__ import annotations

import re

STORY = """\
The harbour wakes before the town does. Long before the bakers light their ovens, the first boats come round the \
breakwater with their lamps still burning, and the gulls rise from the roofs to meet them. The harbour master stands \
at the end of the quay with a mug of tea and counts the masts. She has done so every morning since her father handed \
her the keys of the little office, and she would notice a missing boat as other people notice a missing tooth. When \
all of them are in, she writes a line in the great book, shuts it, and goes to wake the dog.

The dog is old and does not like to be woken. He sleeps in a basket of torn nets behind the stove, and he opens one \
eye to see whether there is fish. If there is fish he gets up. If there is none he closes the eye again and waits for \
the children, who always bring something. The children come down the hill with their satchels, late as ever, and stop \
at the railing to look at the crabs. Their teacher has given up calling them. He has learned that a school beside the \
sea begins when the tide allows it, and that a child who has watched a crab for a quarter of an hour knows more about \
patience than any lesson could explain.

At the fish market the women set out their tables in two long rows. They shout prices at each other for practice, and \
laugh, and shout again. A cook from the hotel walks slowly between the tables with his hands behind his back. He \
never asks what a thing costs. He looks at the eyes of the fish, and at the hands of the woman who sells it, and then \
he nods or does not nod. Behind him walks a boy with a basket, who is learning the trade and would rather be a \
sailor. He has a map of the southern islands under his pillow, and knows the names of all the winds.

Beyond the market the street climbs between white walls. There is a shop that sells rope, lamps and oil, and next to \
it one that sells nothing but clocks. The owner of the clocks is a quiet man who came from the mountains and has \
never learned to swim. All of his clocks show a different time. He says that this is honest, because nobody in the \
town agrees about the hour anyway, and that a person who wants to be punctual should listen to the bell of the \
chapel. The bell is rung by his neighbour, who is deaf, and who rings it when the swallows leave the tower.

In the afternoon the wind turns and the air smells of thyme from the hills. The fishermen mend their nets in the \
shade. They talk about the weather, about the price of diesel, and about a whale that one of them claims to have seen \
when he was young. The whale grows a little every year. Nobody minds. A town needs a whale, says the harbour master, \
and a whale needs somebody who tells about it. Then she laughs, because on the next page of her great book her own \
grandfather has drawn the same whale with a pencil, and it is already longer than the quay.

The lighthouse stands on the outer rock, an hour's row from the steps. Its keeper is a woman of few words who raises \
tomatoes in old paint pots. The light has been turned by a motor for many years, and the authorities have written to \
her more than once that she is no longer needed. She answers each letter politely. She writes that the motor is a \
good motor, but that it does not know when a ship is afraid. On stormy nights she sits beside the lamp with a blanket \
round her shoulders and sings, although there is nobody who could hear it. The keeper of the next light along the \
coast has told her that he does the same.

Once in a summer a stranger arrives who wants to know everything. This year it is a student from the capital with a \
notebook and sensible shoes. She studies how people remember. She asks the fishermen how they find the way home in \
fog, and they tell her about the sound of the surf, which is different at every rock. She asks the cook how he knows \
a good fish, and he thinks about it for a whole day and then says that he does not know how he knows. She asks the \
children, and they take her to the crabs. In the evening she sits on the steps below the office and writes until it \
is too dark to see the page.

The harbour master brings her a cup of tea. She says that people in the town remember badly, all of them, and that \
this has never been a problem. One remembers the rocks and another remembers the debts, and a third remembers who was \
in love with whom. Whoever wants to know something only has to ask the right person. If everybody remembered \
everything, she says, there would be no reason to talk to each other, and besides, nobody would get any work done. \
The student writes this down as well. She underlines the part about the right person, and then she asks who in the \
town remembers the numbers.

For numbers there is the schoolteacher. He keeps them in his head, as others keep pigeons. He knows how many steps \
lead up to the chapel, how many days it rained in any given spring, and what the rope shop charged for lamp oil \
before the war. He has never been asked for most of it. When the student visits him he makes coffee in a copper pot \
and shows her his garden, in which the beans stand in rows like columns in a ledger. He says that a number by itself \
is nothing. It has to be tied to a place, or to a face, or to a smell, and then it will stay for as long as the knot \
holds.

She asks whether he has ever forgotten one. The teacher looks at his beans for a while. Yes, he says, a single time. \
A sailor once asked him to keep a number for him, until he came back from a voyage to the ice. The sailor did not say \
what it was for. The teacher tied it to the colour of the ship, which was green, and to the way the man had held his \
cap in both hands. But the ship came back painted red, and the sailor had lost his cap, and the number was gone. They \
searched for it together for three evenings. Then the sailor said that it did not matter any more, and they played \
cards instead.

In autumn the storms come. The boats are pulled up on the slip and turned over, and from the hill they look like a \
school of sleeping fish. Shutters are closed along the front. The hotel sends its guests home and the cook bakes \
bread for the whole street, because the bakers have gone to visit their daughters in the city. The children have \
lessons in the net loft, where it is warm. There they learn knots, fractions and the names of the stars, in whatever \
order the teacher thinks of them, and when the wind howls in the beams they all stop and listen and try to tell which \
direction it is coming from.

One night the light on the outer rock goes out. The harbour master sees it first, because she is looking for the dog. \
She rings the bell of the chapel herself, and it sounds quite wrong, so that everybody wakes at once. A boat is \
carried down to the water by people in nightshirts. The boy who would rather be a sailor is the first to take an oar, \
and nobody sends him away. It takes them most of the night to reach the rock. They find the keeper sitting on the \
stairs with a broken ankle, quite calm, holding a lantern out of the window with a broom. The motor has stopped, she \
says. It was a good motor, but it did not know how to light a lantern.

They stay with her until the morning. Somebody makes soup from the tomatoes, and somebody else repairs the motor with \
a spoon. When the sun comes up the sea is as flat as a plate, and far out, where the water turns from green to blue, \
they see something large and dark that rises, breathes, and is gone. Nobody says a word. The old fisherman takes off \
his cap. On the way back they agree about its length without any difficulty, and that evening the harbour master \
opens the great book, sharpens a pencil, and begins a new page. She draws slowly, and the dog watches her with one \
eye.
"""


def story(words: int) -> str:
    """The story's first whole sentences, together at most `words` words and at least one sentence."""
    kept: list[str] = []
    for sentence in re.findall(r"\S.*?[.!?](?=\s|$)\s*", STORY, re.DOTALL):
        if kept and len("".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return "".join(kept).strip()
