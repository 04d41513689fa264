// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IArbiterPanel} from "../src/IArbiterPanel.sol";
import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {IStakeVault} from "../src/IStakeVault.sol";
import {IEscrowFactory} from "./Base.sol";
import {MoodyToken, PlainToken} from "./mocks/Tokens.sol";
import {StakeBase} from "./StakeBase.sol";
import {vm} from "./Vm.sol";

interface IPanels {
    function deploy(uint256 threshold, address[] calldata members) external returns (address);
}

/// @notice Plays the vault at random, with deals of an escrow under it, and keeps a model: before each
/// call on the vault the model says whether it will pass and what it will change.
///
/// Two buyers, two sellers, one arbiter and a panel of two of three, a stranger who may send anything.
/// The stake's token refuses some receivers and calls back into the vault; that of the deals is plain.
contract StakeHandler is StakeBase {
    struct Deal {
        IJobEscrow.Terms terms;
        uint256 id;
        uint256 sellerKey;
        bool acked; // the seller has signed an acknowledgement of the input
        bool closed; // its slice is no more
        uint256 slashed;
    }

    struct Model {
        uint256 free;
        uint256 unbonding;
        uint256 unbondAt;
        uint256 maxReserved;
        uint256 deposited;
        uint256 released;
        uint256 slashed;
    }

    uint256 private constant DEALS_MAX = 30;
    uint256 private constant MINTED = 1_000_000;

    Deal[] private _deals;
    mapping(address => Model) private _models;
    address[] public everyone; // two buyers, two sellers, the arbiter, three of the panel, the stranger
    uint256[] private _keys;
    address[2] private _arbiters;
    MoodyToken private _moody;
    uint256 public minted;
    uint256 private _nonce;
    mapping(string => uint256) public passed;

    constructor() {
        vm.warp(START);
        PlainToken plain = new PlainToken();
        token = IERC20(address(plain));
        factory = IEscrowFactory(create("EscrowFactory", ""));
        escrow = IJobEscrow(factory.deploy(address(token)));
        _moody = new MoodyToken();
        useVault(address(_moody));
        for (uint256 i = 0; i < 9; ++i) {
            _keys.push(0x2000 + i);
            address party = vm.addr(_keys[i]);
            everyone.push(party);
            plain.mint(party, MINTED);
            _moody.mint(party, MINTED);
            minted += MINTED;
            allow(party);
            vm.prank(party);
            _moody.approve(address(vault), type(uint256).max);
        }
        _arbiters = [everyone[4], _panel()];
    }

    function setUp() public override {}

    /// @dev Sorts the three members, keys along with them.
    function _panel() private returns (address) {
        for (uint256 n = 0; n < 3; ++n) {
            for (uint256 i = 5; i < 7; ++i) {
                if (everyone[i] < everyone[i + 1]) continue;
                (everyone[i], everyone[i + 1]) = (everyone[i + 1], everyone[i]);
                (_keys[i], _keys[i + 1]) = (_keys[i + 1], _keys[i]);
            }
        }
        address[] memory members = new address[](3);
        (members[0], members[1], members[2]) = (everyone[5], everyone[6], everyone[7]);
        return IPanels(create("PanelFactory", abi.encode(address(factory)))).deploy(2, members);
    }

    // ------------------------------------------------------------------------------- the sellers

    function deposit(uint256 seed) external {
        address who = _seller(seed);
        uint256 amount = _pick(seed, 2, 400);
        bool passes = amount > 0 && _moody.balanceOf(who) >= amount && _fine(address(vault));
        if (!_send(who, abi.encodeCall(IStakeVault.deposit, (amount)), passes, "deposit")) return;
        _models[who].free += amount;
        _models[who].deposited += amount;
    }

    function allowEscrow(uint256 seed) external {
        address who = _seller(seed);
        uint256 most = _pick(seed, 2, 1500);
        if (_send(who, abi.encodeCall(IStakeVault.allow, (address(token), most)), true, "allow")) {
            _models[who].maxReserved = most;
        }
    }

    function unbond(uint256 seed) external {
        address who = _pick(seed, 3, 5) == 0 ? everyone[_pick(seed, 4, 9)] : _seller(seed);
        Model storage m = _models[who];
        uint256 amount = _pick(seed, 2, m.free / 2 + 2);
        bool passes = amount > 0 && amount <= m.free;
        if (!_send(who, abi.encodeCall(IStakeVault.unbond, (amount)), passes, "unbond")) return;
        m.free -= amount;
        m.unbonding += amount;
        m.unbondAt = block.timestamp + UNBOND_SECS;
    }

    function release(uint256 seed) external {
        address who = _seller(seed);
        Model storage m = _models[who];
        if (_pick(seed, 2, 2) == 0 && m.unbonding > 0) {
            // At times to the last moment before, or to the very moment.
            uint256 to = m.unbondAt - _pick(seed, 3, 2);
            if (to > block.timestamp) vm.warp(to);
        }
        bool passes = m.unbonding > 0 && block.timestamp >= m.unbondAt && _fine(who);
        uint256 before = _moody.balanceOf(who);
        if (!_send(who, abi.encodeCall(IStakeVault.release, ()), passes, "release")) return;
        vm.assertEq(_moody.balanceOf(who) - before, m.unbonding, "released");
        m.released += m.unbonding;
        (m.unbonding, m.unbondAt) = (0, 0);
    }

    // --------------------------------------------------------------------------------- the deals

    function openDeal(uint256 seed) external {
        if (_deals.length == DEALS_MAX) return;
        uint256 s = 2 + _pick(seed, 1, 2);
        IJobEscrow.Terms memory t = someTerms();
        (t.buyer, t.seller) = (everyone[_pick(seed, 2, 2)], everyone[s]);
        t.arbiter = _arbiters[_pick(seed, 3, 2)];
        t.price = 1 + _pick(seed, 4, 500);
        t.bond = _pick(seed, 5, 3) == 0 ? 0 : _pick(seed, 6, t.price + 1);
        t.defaultToSeller = _pick(seed, 7, t.price + 1);
        (t.vault, t.stake) = (address(vault), 1 + _pick(seed, 8, 200));
        t.deliverBy = t.lockBy + 1 + _pick(seed, 9, 5000);
        t.nonce = _nonce++;
        Model storage m = _models[t.seller];
        uint256 reserved = reservedOf(t.seller);
        bool passes = t.stake <= m.free && reserved + t.stake <= m.maxReserved;
        bytes memory buyerSig = signTerms(_keys[t.buyer == everyone[0] ? 0 : 1], t);
        bytes memory sellerSig = signTerms(_keys[s], t);
        try escrow.open(t, buyerSig, sellerSig, byAllowance()) returns (uint256 id) {
            vm.assertTrue(passes, "opened without its slice");
            ++passed["open"];
            m.free -= t.stake;
            Deal storage d = _deals.push();
            (d.terms, d.id, d.sellerKey) = (t, id, _keys[s]);
        } catch {
            vm.assertTrue(!passes, "did not open");
        }
        _agree();
    }

    /// @notice The next steps of some deal, one to four, by whom they are due.
    function advance(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, true);
        if (!any) return;
        for (uint256 i = _pick(seed, 9, 4); i < 4; ++i) _step(uint256(keccak256(abi.encode(seed, i))), d);
    }

    function _step(uint256 seed, Deal storage d) private {
        IJobEscrow.Terms memory t = d.terms;
        uint8 phase = phaseOf(d.id);
        if (phase == WORKING && _pick(seed, 2, 4) == 0) {
            d.acked = true;
            if (_pick(seed, 3, 3) == 0 && block.timestamp <= t.deliverBy) {
                vm.prank(t.seller);
                escrow.decline(t);
            }
        } else if (phase == WORKING) {
            vm.prank(t.seller);
            try escrow.submit(d.id, RESULT, "") {} catch {}
        } else if (phase == DELIVERED) {
            vm.prank(t.buyer);
            try escrow.dispute(t, EVIDENCE, "", byAllowance()) {} catch {}
        } else if (phase == DISPUTED) {
            vm.prank(t.seller);
            try escrow.answer(t, EVIDENCE, "", byAllowance()) {} catch {}
        } else if (phase == ANSWERED) {
            _rule(seed, d);
        }
    }

    function settle(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, true);
        if (!any || _pick(seed, 2, 4) != 0) return;
        uint256 toSeller = _pick(seed, 3, d.terms.price + 1);
        bytes memory sellerSig = sign(d.sellerKey, settlementDigest(d.id, RESULT, toSeller));
        vm.prank(d.terms.buyer);
        try escrow.settle(d.terms, RESULT, toSeller, "", sellerSig) {} catch {}
    }

    /// @notice Somebody is silent: to the end of the window, at times by way of expiry, and a poke.
    function silence(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, true);
        if (!any) return;
        IJobEscrow.Terms memory t = d.terms;
        uint8 phase = phaseOf(d.id);
        uint256 limit = clockOf(d.id);
        if (phase == DELIVERED) limit += t.disputeSecs;
        if (phase == DISPUTED) limit += t.answerSecs;
        if (phase == ANSWERED) limit += t.ruleSecs;
        if (_pick(seed, 2, 4) == 0) {
            if (block.timestamp < expiry(t)) vm.warp(expiry(t));
            try escrow.claimRefund(d.id) {} catch {}
            if (_pick(seed, 3, 2) == 0) return;
        }
        if (block.timestamp <= limit) vm.warp(limit + 1);
        escrow.poke(t);
    }

    // ------------------------------------------------------------------------------- the slices

    function close(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, false);
        if (!any) return;
        uint256 limit = d.terms.deliverBy + ACK_SECS;
        if (_pick(seed, 5, 6) == 0) {
            uint256 to = limit + _pick(seed, 6, 2);
            if (to > block.timestamp) vm.warp(to);
        }
        // The seller's own, if there is one; else somebody tries with what he has.
        uint256 kind = _pick(seed, 2, 4);
        bytes memory sig = "";
        if (kind == 0 && d.acked) sig = ackOf(d.sellerKey, d.id);
        if (kind == 1) sig = ackOf(_keys[0], d.id);
        if (kind == 2) sig = ackOf(d.sellerKey, d.id ^ 1);
        _close(d, everyone[_pick(seed, 3, 9)], sig, kind == 0 && d.acked);
    }

    function withdraw(uint256 seed) external {
        address to = everyone[_pick(seed, 1, 9)];
        if (_pick(seed, 2, 2) == 0) _moody.setMood(to, MoodyToken.Mood.Fine);
        bool passes = vault.owed(to) > 0 && _fine(to);
        _send(everyone[8], abi.encodeCall(IStakeVault.withdraw, (to)), passes, "withdraw");
    }

    /// @notice Whoever is no escrow reserves nothing, though the seller allows much.
    function meddle(uint256 seed) external {
        address who = everyone[_pick(seed, 1, 9)];
        bytes memory data = abi.encodeCall(IStakeVault.reserve, (_seller(seed), 1, seed));
        _send(who, data, false, "reserve");
    }

    // --------------------------------------------------------------------------------- the rest

    function mood(uint256 seed) external {
        MoodyToken.Mood[3] memory moods =
            [MoodyToken.Mood.Fine, MoodyToken.Mood.Reverts, MoodyToken.Mood.ReturnsFalse];
        _moody.setMood(everyone[_pick(seed, 1, 9)], moods[_pick(seed, 2, 3)]);
    }

    function reenter(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, false);
        if (!any || _pick(seed, 2, 3) == 0) return _moody.attack(address(0), "");
        bytes[3] memory data = [
            abi.encodeCall(IStakeVault.close, (address(escrow), d.terms, INPUT, "")),
            abi.encodeCall(IStakeVault.withdraw, (d.terms.buyer)),
            abi.encodeCall(IStakeVault.allow, (address(token), 1))
        ];
        _moody.attack(address(vault), data[_pick(seed, 3, 3)]);
    }

    function warp(uint256 seed) external {
        uint256[3] memory steps = [uint256(10), 200, 100_000];
        vm.warp(block.timestamp + 1 + _pick(seed, 2, steps[_pick(seed, 1, 3)]));
    }

    // ----------------------------------------------------------------------------------- checks

    /// @notice The invariants of the vault: it holds what it owes to each, to the unit; what is reserved
    /// is the sum of the open slices; nobody lost more than the stake of a deal, nor without a reason.
    function check() public view {
        uint256 bonded = 0;
        uint256 owed = 0;
        uint256 all = _moody.balanceOf(address(vault));
        for (uint256 i = 0; i < everyone.length; ++i) {
            address who = everyone[i];
            Model storage m = _models[who];
            uint256 slices = 0;
            uint256 slashed = 0;
            for (uint256 j = 0; j < _deals.length; ++j) {
                if (_deals[j].terms.seller != who) continue;
                slashed += _deals[j].slashed;
                if (!_deals[j].closed) slices += _deals[j].terms.stake;
            }
            checkStake(who, m.free, slices, m.unbonding);
            (uint256 reserved,) = vault.allowanceOf(who, address(escrow));
            vm.assertEq(reserved, slices, "reserved by the escrow");
            vm.assertEq(m.deposited, m.free + slices + m.unbonding + m.released + slashed, "conserved");
            bonded += m.free + slices + m.unbonding;
            owed += vault.owed(who);
            all += _moody.balanceOf(who);
        }
        vm.assertEq(_moody.balanceOf(address(vault)), bonded + owed, "held");
        vm.assertEq(all, minted, "minted");
        for (uint256 j = 0; j < _deals.length; ++j) _checkDeal(_deals[j]);
        vm.assertTrue(!_moody.reentered(), "re-entered");
    }

    function _checkDeal(Deal storage d) private view {
        uint256 slice = vault.sliceOf(address(escrow), d.id);
        vm.assertEq(slice, d.closed ? 0 : d.terms.stake, "slice");
        vm.assertLe(d.slashed, d.terms.stake, "slashed at most the stake");
        if (d.slashed == 0) return;
        (IJobEscrow.How how, uint256 penalty) = escrow.outcome(d.id);
        bool ruled = how == IJobEscrow.How.Ruled && d.slashed == penalty;
        bool acked = d.acked && (how == IJobEscrow.How.Undelivered || how == IJobEscrow.How.Declined);
        vm.assertTrue(ruled || acked || how == IJobEscrow.How.SilentSeller, "slashed for a reason");
    }

    /// @notice Long after, all deals and slices end, and the sellers take out all that is theirs.
    function endAll() external {
        _moody.attack(address(0), "");
        for (uint256 i = 0; i < everyone.length; ++i) _moody.setMood(everyone[i], MoodyToken.Mood.Fine);
        vm.warp(block.timestamp + 200 days);
        for (uint256 i = 0; i < _deals.length; ++i) {
            Deal storage d = _deals[i];
            uint8 phase = phaseOf(d.id);
            if (phase < CLOSED) escrow.poke(d.terms);
            if (!d.closed) _close(d, everyone[i % 9], "", false);
            vm.assertTrue(d.closed, "every slice ends");
        }
        for (uint256 i = 2; i < 4; ++i) {
            uint256 free = freeOf(everyone[i]);
            vm.startPrank(everyone[i]);
            if (free > 0) vault.unbond(free);
            vm.warp(block.timestamp + UNBOND_SECS);
            (,, uint256 unbonding,) = vault.stakeOf(everyone[i]);
            if (unbonding > 0) vault.release();
            vm.stopPrank();
        }
        for (uint256 i = 0; i < everyone.length; ++i) {
            if (vault.owed(everyone[i]) > 0) vault.withdraw(everyone[i]);
        }
        vm.assertEq(_moody.balanceOf(address(vault)), 0, "the vault is empty");
        vm.assertEq(token.balanceOf(_arbiters[1]), 0, "the panel keeps nothing");
        vm.assertEq(token.balanceOf(address(escrow)), 0, "the escrow is empty");
    }

    // ---------------------------------------------------------------------------------- helpers

    function _rule(uint256 seed, Deal storage d) private {
        IJobEscrow.Terms memory t = d.terms;
        if (block.timestamp > clockOf(d.id) + t.ruleSecs) return;
        uint256 toSeller = _pick(seed, 4, t.price + 1);
        uint256 penalty = _pick(seed, 5, t.stake + 1);
        if (t.arbiter != _arbiters[1]) return ruleIt(t, toSeller, penalty);
        bytes32 digest = rulingDigest(d.id, toSeller, penalty, EVIDENCE);
        bytes[] memory sigs = new bytes[](3);
        uint256 bits = _pick(seed, 6, 8);
        uint256 count = 0;
        for (uint256 i = 0; i < 3; ++i) {
            if (bits & (1 << i) == 0) continue;
            sigs[i] = sign(_keys[5 + i], digest);
            ++count;
        }
        try IArbiterPanel(t.arbiter).rule(address(escrow), t, toSeller, penalty, EVIDENCE, sigs) {
            vm.assertGe(count, 2, "too few ruled");
            ++passed["panel"];
        } catch {
            vm.assertTrue(count < 2, "enough did not rule");
        }
        vm.assertEq(token.balanceOf(t.arbiter), 0, "the panel keeps nothing");
    }

    function _close(Deal storage d, address caller, bytes memory sig, bool acked) private {
        IJobEscrow.Terms memory t = d.terms;
        (IJobEscrow.How how, uint256 penalty) = escrow.outcome(d.id);
        bool passes = !d.closed && how != IJobEscrow.How.Open;
        uint256 slashed = 0;
        if (how == IJobEscrow.How.Ruled) slashed = penalty;
        if (how == IJobEscrow.How.SilentSeller) slashed = t.stake;
        bool silent = how == IJobEscrow.How.Undelivered || how == IJobEscrow.How.Declined;
        if (silent && block.timestamp <= t.deliverBy + ACK_SECS) (passes, slashed) = (passes && acked, t.stake);

        uint256 before = _moody.balanceOf(t.buyer) + vault.owed(t.buyer);
        bytes memory data = abi.encodeCall(IStakeVault.close, (address(escrow), t, INPUT, sig));
        if (!_send(caller, data, passes, "close")) return;
        (d.closed, d.slashed) = (true, slashed);
        _models[t.seller].free += t.stake - slashed;
        if (slashed > 0) ++passed["slash"];
        vm.assertEq(_moody.balanceOf(t.buyer) + vault.owed(t.buyer) - before, slashed, "the buyer's part");
    }

    function _send(address caller, bytes memory data, bool passes, string memory what) private returns (bool done) {
        vm.prank(caller);
        (done,) = address(vault).call{gas: 30_000_000}(data);
        vm.assertTrue(done == passes, string.concat(what, passes ? ": refused" : ": allowed"));
        if (done) ++passed[what];
    }

    /// @dev No call on the escrow but `open` moves anything here.
    function _agree() private view {
        for (uint256 i = 2; i < 4; ++i) vm.assertEq(freeOf(everyone[i]), _models[everyone[i]].free, "free");
    }

    /// @dev Mostly one whose deal is live, or whose slice is open; else any.
    function _some(uint256 seed, bool live) private view returns (bool any, Deal storage d) {
        assembly ("memory-safe") {
            d.slot := 0
        }
        uint256 count = _deals.length;
        if (count == 0) return (false, d);
        uint256 first = _pick(seed, 11, count);
        for (uint256 i = 0; i < count; ++i) {
            Deal storage other = _deals[(first + i) % count];
            uint8 phase = phaseOf(other.id);
            if (live ? phase < CLOSED : !other.closed && (phase > CLOSED || i + 3 > count)) return (true, other);
        }
        return live ? (false, d) : (true, _deals[first]);
    }

    function _fine(address to) private view returns (bool) {
        return _moody.moodFor(to) == MoodyToken.Mood.Fine;
    }

    function _seller(uint256 seed) private view returns (address) {
        return everyone[2 + _pick(seed, 20, 2)];
    }

    function _pick(uint256 seed, uint256 salt, uint256 count) private pure returns (uint256) {
        return uint256(keccak256(abi.encode(seed, salt))) % count;
    }
}

contract StakeInvariantsTest {
    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    StakeHandler internal handler;

    function setUp() public {
        handler = new StakeHandler();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    /// @dev Only these; the handler's views are not steps. What leads on stands more than once.
    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), _steps());
    }

    function _steps() private pure returns (bytes4[] memory selectors) {
        bytes4[24] memory s = [
            StakeHandler.deposit.selector,
            StakeHandler.deposit.selector,
            StakeHandler.allowEscrow.selector,
            StakeHandler.unbond.selector,
            StakeHandler.release.selector,
            StakeHandler.openDeal.selector,
            StakeHandler.openDeal.selector,
            StakeHandler.openDeal.selector,
            StakeHandler.advance.selector,
            StakeHandler.advance.selector,
            StakeHandler.advance.selector,
            StakeHandler.advance.selector,
            StakeHandler.advance.selector,
            StakeHandler.advance.selector,
            StakeHandler.settle.selector,
            StakeHandler.silence.selector,
            StakeHandler.close.selector,
            StakeHandler.close.selector,
            StakeHandler.close.selector,
            StakeHandler.withdraw.selector,
            StakeHandler.meddle.selector,
            StakeHandler.mood.selector,
            StakeHandler.reenter.selector,
            StakeHandler.warp.selector
        ];
        selectors = new bytes4[](s.length);
        for (uint256 i = 0; i < s.length; ++i) selectors[i] = s[i];
    }

    /// @notice One long walk of fixed steps gets to everything that the model tells apart.
    function test_aWalkGetsEverywhere() public {
        bytes4[] memory steps = _steps();
        for (uint256 i = 0; i < 600; ++i) {
            uint256 seed = uint256(keccak256(abi.encode(i)));
            (bool done,) = address(handler).call(abi.encodeWithSelector(steps[seed % steps.length], seed));
            vm.assertTrue(done, "the model was wrong");
        }
        string[9] memory names =
            ["deposit", "allow", "unbond", "release", "open", "panel", "close", "slash", "withdraw"];
        for (uint256 i = 0; i < names.length; ++i) {
            vm.assertGe(handler.passed(names[i]), 1, string.concat(names[i], ": never"));
        }
        handler.check();
        handler.endAll();
    }

    /// forge-config: test.invariant.runs = 15
    /// forge-config: test.invariant.depth = 200
    function invariant_ofTheVault() public view {
        handler.check();
    }

    /// @notice At the end of every walk all slices end, and all the stake can be taken out.
    function afterInvariant() public {
        handler.check();
        handler.endAll();
    }
}
