// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IArbiterPanel} from "../src/IArbiterPanel.sol";
import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MoodyToken} from "./mocks/Tokens.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {StakeBase} from "./StakeBase.sol";
import {vm} from "./Vm.sol";

interface IPanelFactory {
    error BadThreshold(uint256 threshold, uint256 members);
    error NotAscending(address member);

    function deploy(uint256 threshold, address[] calldata members) external returns (address);
    function panelOf(uint256 threshold, address[] calldata members) external view returns (address);
    function isPanel(address panel) external view returns (bool);
    function panelCode() external view returns (address);
}

/// @notice k of n: who may rule, what the panel is paid, and that nobody can talk it into anything.
contract PanelTest is StakeBase {
    uint256 internal constant N = 5;
    uint256 internal constant K = 3;

    IPanelFactory internal panels;
    IArbiterPanel internal panel;
    IJobEscrow.Terms internal terms;
    uint256 internal id;
    uint256[] internal keys;
    address[] internal all;

    function setUp() public override {
        super.setUp();
        panels = IPanelFactory(create("PanelFactory", abi.encode(address(factory))));
        for (uint256 i = 0; i < N; ++i) _insert(0xA001 + i);
        panel = IArbiterPanel(panels.panelOf(K, all));
        vm.label(address(panel), "panel");
        terms = stakedTerms();
        terms.arbiter = address(panel);
        id = idOf(terms);
    }

    // --------------------------------------------------------------------------------- deploying

    /// @notice The Terms name it, the deal is disputed and answered, and only then there is code.
    function test_deployedWhenNeeded() public {
        openAnswered(terms);
        vm.assertEq(address(panel).code.length, 0, "not there");
        vm.assertEq(panels.deploy(K, all), address(panel), "address");
        vm.assertTrue(panels.isPanel(address(panel)), "known");
        vm.assertEq(panels.deploy(K, all), address(panel), "once more is nothing");
        vm.assertEq(panel.threshold(), K, "threshold");
        vm.assertEq(panel.escrows(), address(factory), "escrows");
        address[] memory told = panel.members();
        vm.assertEq(told.length, N, "members");
        for (uint256 i = 0; i < N; ++i) vm.assertEq(told[i], all[i], "member");
        _rule(600, 100, 7);
        checkClosed(id, IERC8183.Status.Completed, IJobEscrow.How.Ruled);
    }

    function test_addressSaysWhoAndHowMany() public {
        vm.assertTrue(panels.panelOf(K + 1, all) != address(panel), "another threshold");
        address[] memory fewer = new address[](N - 1);
        for (uint256 i = 0; i + 1 < N; ++i) fewer[i] = all[i];
        vm.assertTrue(panels.panelOf(K, fewer) != address(panel), "other members");
        IPanelFactory others = IPanelFactory(create("PanelFactory", abi.encode(address(panels))));
        vm.assertTrue(others.panelOf(K, all) != address(panel), "another factory");
        vm.assertTrue(!panels.isPanel(panels.panelCode()), "the shared code is no panel");
    }

    function test_constitutions() public {
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.BadThreshold.selector, 0, N));
        panels.deploy(0, all);
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.BadThreshold.selector, N + 1, N));
        panels.deploy(N + 1, all);
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.BadThreshold.selector, 0, 0));
        panels.deploy(0, new address[](0));
        address[] memory many = new address[](17);
        for (uint256 i = 0; i < 17; ++i) many[i] = address(uint160(i + 1));
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.BadThreshold.selector, 1, 17));
        panels.deploy(1, many);
        address[] memory two = new address[](2);
        (two[0], two[1]) = (all[1], all[0]);
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.NotAscending.selector, all[0]));
        panels.deploy(1, two);
        (two[0], two[1]) = (all[0], all[0]);
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.NotAscending.selector, all[0]));
        panels.deploy(1, two);
        (two[0], two[1]) = (address(0), all[0]);
        vm.expectRevert(abi.encodeWithSelector(IPanelFactory.NotAscending.selector, address(0)));
        panels.deploy(1, two);
    }

    /// @notice The code that the clones share has no members, so it can do nothing.
    function test_theSharedCodeIsNoPanel() public {
        IArbiterPanel code = IArbiterPanel(panels.panelCode());
        vm.expectRevert();
        code.threshold();
        terms.arbiter = address(code);
        id = idOf(terms);
        openAnswered(terms);
        vm.expectRevert();
        code.rule(address(escrow), terms, 0, 0, EVIDENCE, new bytes[](0));
    }

    // ------------------------------------------------------------------------------------ ruling

    /// @notice All ways to sign: with k or more of n it rules, with fewer it does not.
    function test_everySetOfSigners() public {
        openAnswered(terms);
        panels.deploy(K, all);
        uint256 state = vm.snapshotState();
        for (uint256 bits = 0; bits < 1 << N; ++bits) {
            bytes[] memory sigs = _sigs(600, 100, bits);
            uint256 count = _count(bits);
            if (count < K) {
                vm.expectRevert(abi.encodeWithSelector(IArbiterPanel.TooFew.selector, count, K));
                panel.rule(address(escrow), terms, 600, 100, EVIDENCE, sigs);
                continue;
            }
            panel.rule(address(escrow), terms, 600, 100, EVIDENCE, sigs);
            _checkFees(bits, BOND);
            (IJobEscrow.How how, uint256 penalty) = escrow.outcome(id);
            vm.assertEq(uint256(how), uint256(IJobEscrow.How.Ruled), "ruled");
            vm.assertEq(penalty, 100, "penalty");
            vm.revertToState(state);
        }
    }

    function test_aCallingMemberHasSigned() public {
        openAnswered(terms);
        panels.deploy(K, all);
        bytes[] memory sigs = _sigs(600, 0, 3);
        vm.expectPartialRevert(IArbiterPanel.TooFew.selector);
        vm.prank(stranger);
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
        // One who has signed does not count twice by calling.
        vm.expectPartialRevert(IArbiterPanel.TooFew.selector);
        vm.prank(all[0]);
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
        vm.prank(all[4]);
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
        _checkFees(19, BOND);
    }

    function test_wrongSignatures() public {
        openAnswered(terms);
        panels.deploy(K, all);
        // Of one ruling each: they do not agree.
        bytes[] memory sigs = _sigs(600, 0, 3);
        sigs[2] = _sigs(601, 0, 4)[2];
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, all[2]));
        sigs[2] = _sigs(600, 1, 4)[2];
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, all[2]));
        // A member in another's place, and a stranger.
        sigs[2] = sigs[1];
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, all[2]));
        sigs[2] = sign(STRANGER_KEY, rulingDigest(id, 600, 0, EVIDENCE));
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, all[2]));
        // In the domain of the panel, not of the escrow.
        IJobEscrow kept = escrow;
        escrow = IJobEscrow(address(panel));
        sigs[2] = _sigs(600, 0, 4)[2];
        escrow = kept;
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, all[2]));
        _refused(new bytes[](N - 1), abi.encodeWithSelector(IArbiterPanel.WrongCount.selector, N - 1, N));
        _refused(new bytes[](N + 1), abi.encodeWithSelector(IArbiterPanel.WrongCount.selector, N + 1, N));
    }

    /// @notice The escrow itself takes no panel's signature: there is one way in, and it counts.
    function test_noWayRoundThePanel() public {
        openAnswered(terms);
        panels.deploy(K, all);
        bytes[] memory sigs = _sigs(600, 0, 31);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, address(panel)));
        vm.prank(all[0]);
        escrow.rule(terms, 600, 0, EVIDENCE, bytes.concat(sigs[0], sigs[1], sigs[2]));
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, address(panel)));
        escrow.rule(terms, 600, 0, EVIDENCE, sigs[0]);
        // An escrow that no factory deployed may answer what it likes: the panel does not ask it.
        vm.expectRevert(abi.encodeWithSelector(IArbiterPanel.NotAnEscrow.selector, stranger));
        panel.rule(stranger, terms, 600, 0, EVIDENCE, sigs);
        // Terms with another arbiter are not this panel's to rule, whatever its members signed.
        IJobEscrow.Terms memory other = stakedTerms();
        other.nonce = 8;
        uint256 panelsId = id;
        id = openAnswered(other);
        sigs = _sigs(600, 0, 31);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, arbiter));
        panel.rule(address(escrow), other, 600, 0, EVIDENCE, sigs);
        id = panelsId;
    }

    function test_limitsOfARuling() public {
        openAnswered(terms);
        panels.deploy(K, all);
        uint256 limit = block.timestamp + terms.ruleSecs;
        bytes[] memory sigs = _sigs(PRICE + 1, 0, 7);
        vm.expectPartialRevert(IJobEscrow.SplitAbovePrice.selector);
        panel.rule(address(escrow), terms, PRICE + 1, 0, EVIDENCE, sigs);
        sigs = _sigs(0, STAKE + 1, 7);
        vm.expectPartialRevert(IJobEscrow.PenaltyAboveStake.selector);
        panel.rule(address(escrow), terms, 0, STAKE + 1, EVIDENCE, sigs);
        sigs = _sigs(0, STAKE, 7);
        uint256 state = vm.snapshotState();
        vm.warp(limit);
        panel.rule(address(escrow), terms, 0, STAKE, EVIDENCE, sigs);
        vm.expectPartialRevert(IJobEscrow.WrongPhase.selector);
        panel.rule(address(escrow), terms, 0, STAKE, EVIDENCE, sigs);
        closeSlice(terms, "");
        checkStake(seller, BONDED - STAKE, 0, 0);
        vm.revertToState(state);
        vm.warp(limit + 1);
        vm.expectRevert(abi.encodeWithSelector(IERC8183.TooLate.selector, id, limit));
        panel.rule(address(escrow), terms, 0, STAKE, EVIDENCE, sigs);
        // No agreement in time: the default split, and no fee.
        uint256 before = token.balanceOf(seller);
        escrow.poke(terms);
        vm.assertEq(token.balanceOf(seller) - before, terms.defaultToSeller + BOND, "default");
        vm.assertEq(token.balanceOf(address(panel)), 0, "no fee");
    }

    /// @notice In every phase but answered, at any caller's hand, nothing happens.
    function test_onlyAnswered() public {
        panels.deploy(K, all);
        bytes[] memory sigs = _sigs(600, 0, 31);
        address[4] memory callers = [buyer, seller, all[0], stranger];
        for (uint256 step = 0; step < 5; ++step) {
            if (step == 1) open(terms);
            if (step == 2) submit(id);
            if (step == 3) dispute(terms);
            if (step == 4) pokeAt(terms, block.timestamp + terms.answerSecs + 1);
            uint8 phase = phaseOf(id);
            for (uint256 i = 0; i < callers.length; ++i) {
                vm.prank(callers[i]);
                vm.expectRevert(abi.encodeWithSelector(IJobEscrow.WrongPhase.selector, id, phase));
                panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
            }
        }
    }

    function test_contractsAsMembers() public {
        Wallet wallet = new Wallet(vm.addr(0xA0FF));
        delete keys;
        delete all;
        _insert(0xA001);
        _insert(0xA002);
        _insertAt(address(wallet), 0xA0FF);
        panel = IArbiterPanel(panels.deploy(3, all));
        terms.arbiter = address(panel);
        id = openAnswered(terms);
        bytes[] memory sigs = _sigs(600, 0, 7);
        uint256 state = vm.snapshotState();
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
        _checkFees(7, BOND);
        vm.revertToState(state);
        wallet.revoke();
        _refused(sigs, abi.encodeWithSelector(IArbiterPanel.BadSignature.selector, address(wallet)));
    }

    // -------------------------------------------------------------------------------------- fees

    function testFuzz_feesAddUp(uint256 bits, uint256 bond, uint256 price, uint256 toSeller) public {
        bits %= 1 << N;
        vm.assume(_count(bits) >= K);
        price = 1 + price % 10_000;
        (terms.price, terms.bond) = (price, bond % (price + 1));
        terms.defaultToSeller = 0;
        id = idOf(terms);
        openDisputed(terms);
        if (terms.bond != 0) answer(terms);
        panels.deploy(K, all);
        _rule(toSeller % (price + 1), 0, bits);
        _checkFees(bits, terms.bond);
        vm.assertEq(token.balanceOf(address(panel)), 0, "nothing stays");
        vm.assertEq(token.balanceOf(address(escrow)), 0, "nor there");
    }

    /// @notice A member who cannot be paid holds up nobody; he is owed.
    function test_memberWhoCannotBePaid() public {
        MoodyToken moody = _useMoody();
        moody.setMood(all[1], MoodyToken.Mood.Reverts);
        openAnswered(terms);
        panels.deploy(K, all);
        _rule(600, 0, 7);
        vm.assertEq(moody.balanceOf(all[0]), 30, "first");
        vm.assertEq(moody.balanceOf(all[2]), 30, "third");
        vm.assertEq(panel.owed(address(moody), all[1]), 30, "owed");
        vm.expectRevert();
        panel.withdraw(address(moody), all[1]);
        moody.setMood(all[1], MoodyToken.Mood.Fine);
        vm.prank(stranger);
        panel.withdraw(address(moody), all[1]);
        vm.assertEq(moody.balanceOf(all[1]), 30, "paid");
        vm.expectRevert(abi.encodeWithSelector(IArbiterPanel.NothingOwed.selector, address(moody), all[1]));
        panel.withdraw(address(moody), all[1]);
    }

    /// @notice If the token refuses the panel itself, the escrow owes it, and it its members.
    function test_panelThatCannotBePaid() public {
        MoodyToken moody = _useMoody();
        moody.setMood(address(panel), MoodyToken.Mood.ReturnsFalse);
        openAnswered(terms);
        panels.deploy(K, all);
        _rule(600, 0, 7);
        vm.assertEq(escrow.owed(address(panel)), BOND, "owed to the panel");
        moody.setMood(address(panel), MoodyToken.Mood.Fine);
        vm.expectRevert();
        panel.withdraw(address(moody), all[0]);
        escrow.withdraw(address(panel));
        for (uint256 i = 0; i < 3; ++i) {
            panel.withdraw(address(moody), all[i]);
            vm.assertEq(moody.balanceOf(all[i]), 30, "paid");
        }
        vm.assertEq(moody.balanceOf(address(panel)), 0, "empty");
    }

    function test_noWayBackIn() public {
        MoodyToken moody = _useMoody();
        openAnswered(terms);
        panels.deploy(K, all);
        bytes[] memory sigs = _sigs(600, 0, 7);
        moody.attack(
            address(panel), abi.encodeCall(IArbiterPanel.rule, (address(escrow), terms, 600, 0, EVIDENCE, sigs))
        );
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
        vm.assertTrue(!moody.reentered(), "re-entered");
        vm.assertEq(moody.balanceOf(all[0]), 30, "one fee");
    }

    // ----------------------------------------------------------------------------------- helpers

    function _insert(uint256 key) private {
        _insertAt(vm.addr(key), key);
    }

    function _insertAt(address member, uint256 key) private {
        all.push(member);
        keys.push(key);
        for (uint256 i = all.length - 1; i > 0 && all[i] < all[i - 1]; --i) {
            (all[i], all[i - 1]) = (all[i - 1], all[i]);
            (keys[i], keys[i - 1]) = (keys[i - 1], keys[i]);
        }
    }

    function _sigs(uint256 toSeller, uint256 penalty, uint256 bits) private view returns (bytes[] memory sigs) {
        bytes32 digest = rulingDigest(id, toSeller, penalty, EVIDENCE);
        sigs = new bytes[](all.length);
        for (uint256 i = 0; i < all.length; ++i) {
            if (bits & (1 << i) != 0) sigs[i] = sign(keys[i], digest);
        }
    }

    function _rule(uint256 toSeller, uint256 penalty, uint256 bits) private {
        bytes[] memory sigs = _sigs(toSeller, penalty, bits);
        vm.prank(stranger);
        panel.rule(address(escrow), terms, toSeller, penalty, EVIDENCE, sigs);
    }

    function _refused(bytes[] memory sigs, bytes memory reason) private {
        vm.expectRevert(reason);
        panel.rule(address(escrow), terms, 600, 0, EVIDENCE, sigs);
    }

    function _count(uint256 bits) private pure returns (uint256 count) {
        for (; bits != 0; bits &= bits - 1) ++count;
    }

    /// @dev Equal parts; the dust went to the first who signed; nobody else got anything.
    function _checkFees(uint256 bits, uint256 fee) private view {
        uint256 count = _count(bits);
        bool first = true;
        for (uint256 i = 0; i < all.length; ++i) {
            uint256 due = 0;
            if (bits & (1 << i) != 0) {
                due = fee / count + (first ? fee % count : 0);
                first = false;
            }
            vm.assertEq(token.balanceOf(all[i]), due, "fee");
        }
    }

    function _useMoody() private returns (MoodyToken moody) {
        moody = new MoodyToken();
        token = IERC20(address(moody));
        useFactory();
        moody.mint(buyer, 10_000);
        moody.mint(seller, 10_000);
        terms.asset = address(moody);
        (terms.vault, terms.stake) = (address(0), 0);
        id = idOf(terms);
    }
}
