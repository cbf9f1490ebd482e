"""The same few sentences of science in several languages, by ISO 639-1 code."""

PARAGRAPHS = {
    "en": (
        "Glaciers move because ice deforms under its own weight and slides over the rock below. We measured "
        "the speed of one of them with satellites over four winters, and found that it doubles in spring, "
        "when water from the surface reaches the bed and lifts the ice a little."
    ),
    "de": (
        "Gletscher bewegen sich, weil sich das Eis unter dem eigenen Gewicht verformt und über den Fels "
        "gleitet. Wir haben die Geschwindigkeit eines Gletschers vier Winter lang mit Satelliten gemessen und "
        "gesehen, dass sie sich im Frühling verdoppelt, wenn das Wasser von der Oberfläche bis zum Grund "
        "gelangt."
    ),
    "fr": (
        "Les glaciers avancent parce que la glace se déforme sous son propre poids et glisse sur la roche. "
        "Nous avons mesuré la vitesse de l'un d'eux par satellite pendant quatre hivers, et nous avons "
        "constaté qu'elle double au printemps, quand l'eau de la surface atteint le lit et soulève un peu la "
        "glace."
    ),
    "es": (
        "Los glaciares se mueven porque el hielo se deforma bajo su propio peso y se desliza sobre la roca. "
        "Medimos la velocidad de uno de ellos con satélites durante cuatro inviernos y encontramos que se "
        "duplica en primavera, cuando el agua de la superficie llega hasta el fondo y levanta un poco el "
        "hielo."
    ),
    "it": (
        "I ghiacciai si muovono perché il ghiaccio si deforma sotto il proprio peso e scivola sulla roccia. "
        "Abbiamo misurato la velocità di uno di essi con i satelliti per quattro inverni e abbiamo visto che "
        "raddoppia in primavera, quando l'acqua della superficie raggiunge il fondo e solleva un poco il "
        "ghiaccio."
    ),
    "pl": (
        "Lodowce poruszają się, ponieważ lód odkształca się pod własnym ciężarem i ślizga się po skale. Przez "
        "cztery zimy mierzyliśmy z satelity prędkość jednego z nich i zauważyliśmy, że na wiosnę się podwaja, "
        "kiedy woda z powierzchni dociera do podłoża i nieco unosi lód, a potem znowu maleje."
    ),
    "ru": (
        "Ледники движутся, потому что лёд деформируется под собственным весом и скользит по скале. Мы "
        "измеряли скорость одного из них со спутника в течение четырёх зим и обнаружили, что весной она "
        "удваивается, когда вода с поверхности достигает ложа и немного приподнимает лёд."
    ),
    "zh": (
        "冰川之所以移动，是因为冰在自身重量的作用下发生变形，并沿着下面的岩石滑动。我们用卫星连续四个冬天测量"
        "了其中一条冰川的速度，发现到了春天速度会增加一倍，因为那时地表的融水流到冰床，把冰稍微抬起来。夏天过"
        "去以后，水从冰下的通道流走，冰川又慢慢恢复到原来的速度。我们认为这种变化每年都会重复，并且与气温有密"
        "切的关系。为了检验这个想法，我们把测量结果和附近气象站的记录进行了比较，两者之间的一致性相当好。"
    ),
    "ja": (
        "氷河が動くのは、氷が自分の重さで変形し、下の岩の上を滑るからである。私たちは人工衛星を使って四つの冬"
        "にわたり一つの氷河の速さを測り、春になると速さが二倍になることを見いだした。それは表面の水が底まで届"
        "き、氷を少し持ち上げるためだと考えられる。夏が過ぎると水は氷の下の水路を通って流れ去り、氷河はもとの"
        "速さに戻っていく。この変化は毎年くり返され、気温と深い関係があると思われる。そこで近くの気象台の記録"
        "と比べたところ、両者はかなりよく一致していた。"
    ),
}
