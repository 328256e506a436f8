/* Skirmish, a small card game for two players, many games at a time. C99, and C++ as well.
 *
 * A turn: ready the units, get energy, draw a card; then deploy units to free places, attack with
 * ready ones, cast spells, and end the turn. Guards must be attacked first. Whoever ends a turn with
 * more than KEEP cards first discards down to that. Drawing from an empty deck costs life, one more
 * each time, so every game ends; who has no life left has lost.
 *
 * Row 2 * g + p of all arrays is player p of game g. An action is (primary, sub1, sub2, sub3), 0 where
 * a primary does not use a slot. The player who waits has an empty list and sends zeros. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PLACES = 4, FACE = PLACES, HAND = 6, KEEP = 5, DECK = 16, LIFE = 12, ROOM = 1024 };
enum { MAIN, DISCARDING };
enum { END_TURN, DEPLOY, ATTACK, BOLT, DUEL, MEND, DISCARD, PRIMARIES };
enum { NO_CARD, RECRUIT, SOLDIER, GUARD, KNIGHT, GIANT, BOLT_CARD, DUEL_CARD, MEND_CARD, CARDS };
enum { BOLT_DAMAGE = 3, MEND_HEALTH = 3 };

static const struct { uint8_t primary, cost, attack, health; } RULES[CARDS] = {
    {END_TURN, 0, 0, 0}, {DEPLOY, 1, 1, 2}, {DEPLOY, 2, 3, 2}, {DEPLOY, 2, 1, 4}, {DEPLOY, 3, 3, 3},
    {DEPLOY, 5, 5, 6},   {BOLT, 2, 0, 0},   {DUEL, 1, 0, 0},   {MEND, 1, 0, 0},
};
static const uint8_t FULL_DECK[DECK] = {
    RECRUIT, RECRUIT, RECRUIT, SOLDIER, SOLDIER, SOLDIER, GUARD, GUARD,
    KNIGHT, KNIGHT, GIANT, BOLT_CARD, BOLT_CARD, DUEL_CARD, DUEL_CARD, MEND_CARD,
};

/* What a player sees. The compiler pads it as it likes. */

typedef struct {
    uint8_t kind; /* NO_CARD where the place is free */
    int16_t health;
    uint8_t attack;
    uint8_t ready;
} Unit;

typedef struct {
    int16_t life;
    uint8_t energy;
    uint8_t held;
    uint8_t hand[HAND]; /* kinds; zeros in the opponent's */
    int32_t deck;       /* cards left */
    Unit board[PLACES];
} Side;

typedef struct {
    uint8_t primary[ROOM], sub1[ROOM], sub2[ROOM], sub3[ROOM];
} Mask;

typedef struct {
    Side me, them;
    uint8_t phase;
    uint16_t count; /* legal actions: the first places of the mask's columns */
    Mask mask;
    int32_t turn;
} Observation;

typedef struct {
    uint64_t random;
    Side sides[2];
    uint8_t decks[2][DECK];
    uint8_t fatigue[2];
    uint8_t mover, phase;
    int32_t turn;
} Game;

static uint32_t draw_below(Game *game, uint32_t bound) { /* splitmix64 */
    uint64_t z = (game->random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

static void draw_card(Game *game, int player) {
    Side *side = &game->sides[player];
    if (side->deck)
        side->hand[side->held++] = game->decks[player][--side->deck];
    else
        side->life = (int16_t)(side->life - ++game->fatigue[player]);
}

static void begin_turn(Game *game) {
    Side *side = &game->sides[game->mover];
    int own_turns = 1 + game->turn++ / 2;
    game->phase = MAIN;
    side->energy = (uint8_t)(own_turns < 6 ? own_turns : 6);
    for (int i = 0; i < PLACES; i++) side->board[i].ready = side->board[i].kind != NO_CARD;
    draw_card(game, game->mover);
}

static void deal(Game *game) {
    uint64_t random = game->random;
    memset(game, 0, sizeof *game);
    game->random = random;
    for (int player = 0; player < 2; player++) {
        uint8_t *deck = game->decks[player];
        memcpy(deck, FULL_DECK, DECK);
        for (int i = DECK - 1; i > 0; i--) {
            int j = (int)draw_below(game, (uint32_t)i + 1);
            uint8_t kind = deck[i];
            deck[i] = deck[j];
            deck[j] = kind;
        }
        game->sides[player].life = LIFE;
        game->sides[player].deck = DECK;
        for (int i = 0; i < 3 + player; i++) draw_card(game, player);
    }
    begin_turn(game);
}

static int guarded(const Side *side) {
    for (int i = 0; i < PLACES; i++)
        if (side->board[i].kind == GUARD) return 1;
    return 0;
}

/* The rules, as a question about one action. */
static int is_legal(const Game *game, int player, const int32_t *action) {
    const Side *me = &game->sides[player], *them = &game->sides[1 - player];
    const int32_t a = action[1], b = action[2], c = action[3];
    static const uint8_t used[PRIMARIES] = {0, 2, 2, 2, 3, 2, 1};
    if (player != game->mover || action[0] < 0 || action[0] >= PRIMARIES) return 0;
    for (int slot = used[action[0]] + 1; slot < 4; slot++)
        if (action[slot] != 0) return 0;
    if (action[0] == DISCARD || game->phase == DISCARDING)
        return action[0] == DISCARD && game->phase == DISCARDING && a >= 0 && a < me->held;
    if (action[0] == END_TURN) return 1;
    if (action[0] == ATTACK) {
        if (a < 0 || a >= PLACES || !me->board[a].ready || b < 0 || b > FACE) return 0;
        if (guarded(them)) return b != FACE && them->board[b].kind == GUARD;
        return b == FACE || them->board[b].kind != NO_CARD;
    }
    if (a < 0 || a >= me->held || RULES[me->hand[a]].primary != action[0]) return 0;
    if (RULES[me->hand[a]].cost > me->energy || b < 0) return 0;
    if (action[0] == DEPLOY) return b < PLACES && me->board[b].kind == NO_CARD;
    if (action[0] == BOLT) return b == FACE || (b < PLACES && them->board[b].kind != NO_CARD);
    if (b >= PLACES || me->board[b].kind == NO_CARD) return 0;
    return action[0] == MEND || (c >= 0 && c < PLACES && them->board[c].kind != NO_CARD);
}

static void list(Observation *seen, int primary, int a, int b, int c) {
    Mask *mask = &seen->mask;
    mask->primary[seen->count] = (uint8_t)primary;
    mask->sub1[seen->count] = (uint8_t)a;
    mask->sub2[seen->count] = (uint8_t)b;
    mask->sub3[seen->count++] = (uint8_t)c;
}

/* The rules again, as a list: goes through what is there. */
static void list_legal(Observation *seen) {
    const Side *me = &seen->me, *them = &seen->them;
    int must_hit_guards = guarded(them);
    if (seen->phase == DISCARDING) {
        for (int i = 0; i < me->held; i++) list(seen, DISCARD, i, 0, 0);
        return;
    }
    list(seen, END_TURN, 0, 0, 0);
    for (int i = 0; i < me->held; i++) {
        int primary = RULES[me->hand[i]].primary;
        if (RULES[me->hand[i]].cost > me->energy) continue;
        if (primary == BOLT) list(seen, BOLT, i, FACE, 0);
        for (int j = 0; j < PLACES; j++) {
            int ally = me->board[j].kind != NO_CARD, enemy = them->board[j].kind != NO_CARD;
            if (primary == DEPLOY && !ally) list(seen, DEPLOY, i, j, 0);
            if (primary == BOLT && enemy) list(seen, BOLT, i, j, 0);
            if (primary == MEND && ally) list(seen, MEND, i, j, 0);
            for (int k = 0; primary == DUEL && ally && k < PLACES; k++)
                if (them->board[k].kind != NO_CARD) list(seen, DUEL, i, j, k);
        }
    }
    for (int i = 0; i < PLACES; i++) {
        if (!me->board[i].ready) continue;
        if (!must_hit_guards) list(seen, ATTACK, i, FACE, 0);
        for (int j = 0; j < PLACES; j++)
            if (them->board[j].kind == GUARD || (!must_hit_guards && them->board[j].kind))
                list(seen, ATTACK, i, j, 0);
    }
}

static void observe(const Game *game, Observation *seen) {
    for (int player = 0; player < 2; player++, seen++) {
        memset(seen, 0, sizeof *seen);
        seen->me = game->sides[player];
        seen->them = game->sides[1 - player];
        memset(seen->them.hand, 0, HAND);
        seen->phase = game->phase;
        seen->turn = game->turn;
        if (player == game->mover) list_legal(seen);
    }
}

static void hurt(Unit *unit, int damage) {
    unit->health = (int16_t)(unit->health - damage);
    if (unit->health <= 0) memset(unit, 0, sizeof *unit);
}

static void strike(Unit *one, Unit *other) {
    int damage = one->attack, back = other->attack;
    hurt(other, damage);
    hurt(one, back);
}

static void remove_card(Side *side, int place) {
    memmove(side->hand + place, side->hand + place + 1, (size_t)(HAND - 1 - place));
    side->hand[HAND - 1] = NO_CARD;
    side->held--;
}

/* Plays a legal action; 1 if the game is over. */
static int play(Game *game, const int32_t *action) {
    Side *me = &game->sides[game->mover], *them = &game->sides[1 - game->mover];
    const int primary = action[0], a = action[1], b = action[2], c = action[3];
    if (primary == ATTACK) {
        me->board[a].ready = 0;
        if (b == FACE)
            them->life = (int16_t)(them->life - me->board[a].attack);
        else
            strike(&me->board[a], &them->board[b]);
    } else if (primary != END_TURN) {
        int kind = me->hand[a];
        remove_card(me, a);
        if (primary != DISCARD) me->energy = (uint8_t)(me->energy - RULES[kind].cost);
        if (primary == DEPLOY) {
            Unit *unit = &me->board[b];
            unit->kind = (uint8_t)kind;
            unit->health = RULES[kind].health;
            unit->attack = RULES[kind].attack;
        } else if (primary == BOLT && b == FACE) {
            them->life = (int16_t)(them->life - BOLT_DAMAGE);
        } else if (primary == BOLT) {
            hurt(&them->board[b], BOLT_DAMAGE);
        } else if (primary == DUEL) {
            strike(&me->board[b], &them->board[c]);
        } else if (primary == MEND) {
            me->board[b].health = (int16_t)(me->board[b].health + MEND_HEALTH);
        }
    }
    if (primary == END_TURN || primary == DISCARD) {
        game->phase = DISCARDING;
        if (me->held <= KEEP) {
            game->mover = (uint8_t)(1 - game->mover);
            begin_turn(game);
        }
    }
    return me->life <= 0 || them->life <= 0;
}

#ifdef __cplusplus
extern "C" {
#endif

size_t skirmish_game_size(void) { return sizeof(Game); }

size_t skirmish_observation_size(void) { return sizeof(Observation); }

void skirmish_reset(Game *games, int32_t n, uint64_t seed, Observation *seen) {
    for (int32_t g = 0; g < n; g++) {
        games[g].random = seed + (uint64_t)g * 0xd1342543de82ef95u;
        deal(&games[g]);
        observe(&games[g], seen + 2 * g);
    }
}

int32_t skirmish_to_move(const Game *games, int32_t row) { return games[row / 2].mover == row % 2; }

int32_t skirmish_is_legal(const Game *games, int32_t row, const int32_t *action) {
    return is_legal(&games[row / 2], row % 2, action);
}

/* Plays (2 * n, 4) actions. A game that ends gives +1 and -1 and starts anew. Returns -1, or the
 * first row whose action is illegal, and has played nothing then. */
int32_t skirmish_step(Game *games, int32_t n, const int32_t *actions, Observation *seen,
                      float *rewards, uint8_t *terminals) {
    static const int32_t nothing[4] = {0, 0, 0, 0};
    for (int32_t row = 0; row < 2 * n; row++) {
        const int32_t *action = actions + 4 * row;
        if (skirmish_to_move(games, row) ? !skirmish_is_legal(games, row, action)
                                         : memcmp(action, nothing, sizeof nothing) != 0)
            return row;
    }
    for (int32_t g = 0; g < n; g++) {
        Game *game = &games[g];
        int over = play(game, actions + 4 * (2 * g + game->mover));
        int first_lost = game->sides[0].life <= 0;
        for (int player = 0; player < 2; player++) {
            rewards[2 * g + player] = over ? (player == first_lost ? 1.0f : -1.0f) : 0.0f;
            terminals[2 * g + player] = (uint8_t)over;
        }
        if (over) deal(game);
        observe(game, seen + 2 * g);
    }
    return -1;
}

#ifdef __cplusplus
}
#endif
