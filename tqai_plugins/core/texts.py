"""Built-in texts: prose to measure on and to learn key means from, and the prompt of the demo. Written for tqai; MIT like the rest."""

STORY = """\
The lighthouse on Gull Rock was built in 1871 by an engineer named Clara Hedley, who had never seen the sea before \
she was given the work. She came from a mining town a long way inland, and what she knew about stone she had learned \
underground. The men of the harbour did not trust her plan. She wanted to cut the first nine courses of the tower into \
the rock itself, so that every block was held by its neighbours and by the island, and she wanted to do it in winter, \
when the low tides were lowest. It took three winters. Nobody died, which was rare in those days, and only one boat was \
lost, an old barge that carried lime and broke its rope on a calm night in May.

The lamp was lit for the first time on the second of October 1874. It burned rapeseed oil and could be seen for \
eighteen miles. The first keeper was Tobias Wren, a quiet man who had been a sailor and then a clockmaker. He kept a \
log in a clear hand, with one line for each night: the wind, the weather, the oil burned, the ships seen. On most nights \
the last column says none. He also kept bees, in two hives on the south side of the tower, and sold the honey in the \
town when the supply boat came, once every two weeks if the sea allowed it. His daughter Ada learned to read from the \
log. When she was eleven years old she noticed that the oil burned on clear nights was always a little less than on \
foggy ones, although the lamp was the same, and she wrote a letter about it to the lighthouse board. The board answered, \
four months later, that the wick was drawing damp air, and that a ring of copper would mend it. It did.

In 1902 the lamp was changed to paraffin, and in 1936 a cable was laid from the mainland and the keepers had electric \
light. The last keeper left in 1981. Since then a small computer has turned the lamp on and off, and a radio tells the \
harbour if anything is wrong. The hives are gone, but every spring bees are seen on the south side of the rock, where \
thrift and sea campion grow in the cracks that the masons left. Visitors can climb the one hundred and forty-two steps \
on the first Sunday of each month, from April to September, if they book a place on the boat. Most of them ask the same \
two questions: whether the tower moves in a storm, and whether it is haunted. The guide, who is the great-granddaughter \
of Ada Wren, answers that it moves by the width of a thumb, and that it is not haunted, but that on foggy nights the old \
copper ring can be heard ticking as it cools."""

PROSE = (
    STORY
    + """

There is a second story about the rock, which is not in the log. In the hard winter of 1895 the supply boat did not \
come for seven weeks. The keeper and his family had flour, dried peas and the honey, and they had rain water in the \
cistern, but the coal ran out after the third week. They burned the empty crates first, then the shelves, and then the \
doors of the rooms that were not used. They never burned the oil, because the oil belonged to the lamp. One evening Ada, \
who was a grown woman by then and home for a visit, counted the lights in the harbour and saw that there was one more \
than there should be. It was a ship, and it was on the wrong side of the bank. She could not row out to it and no voice \
would carry so far, so she did the only thing left to do. She covered the lamp with a blanket, took it away, and covered \
it again, three short and three long, until her arms hurt. A lighthouse that blinks where it should be steady is the \
strangest thing a sailor can see. The captain stopped his engine to look at his chart, and while he was looking the tide \
turned and carried the ship gently back into deep water. It was a coal ship. In the morning its crew lowered forty sacks \
onto the landing stage, and would not take any money for them.

People who hear that story like to ask what it means. The guide says that it need not mean anything. A tower is a \
simple machine: it holds up a light, and the light says where the rock is. Everything else, the courses cut into the \
stone, the copper ring, the columns of the log, is there so that the simple thing happens every night. Clara Hedley \
wrote much the same in her notebook, in the winter when the work began. She had drawn the tower in pencil, with all its \
measures, and below the drawing there is one line in ink. Build it so that nobody has to think about it again. She \
never came back to see the lamp lit, for by then she was building a bridge in another country, and she did not answer \
the letter in which the harbour asked her to name the light. It is called Hedley's Light all the same, on the charts of \
three nations and in the songs of one, and the ships that pass it at night seldom know that it has a name at all.
"""
)

DEMO_PROMPT = f"Read this text.\n\n{STORY}\n\nWho built the lighthouse, who was its first keeper, and what did he sell?"
